"""What does autograd keep of a forward pass?

A graph of nodes, one for each operation, with edges back to the parameters. Drawn here with the shape of the gradient
that flows along each edge, for a stock network and for the fused one: all layers are one node.
"""

import torch
from common import BLUE, GREY, ORANGE, plt, save, start

from mlpkit.nn import MLP


def graph(root, names):
    """Nodes by depth from the loss, edges, and the shape of every gradient that arrives at a node."""
    depth, edges, shapes, order = {root: 0}, [], {}, [root]
    for node in order:
        for child, _ in node.next_functions:
            if child is not None:
                edges.append((node, child))
                if child not in depth:
                    order.append(child)
                depth[child] = max(depth.get(child, 0), depth[node] + 1)
    hooks = [node.register_prehook(lambda grads, node=node: shapes.update({node: grads[0].shape})) for node in order]
    operations = {node: "fused layers" if "mlpkit" in node.name() else node.name() for node in order}
    labels = {node: names.get(getattr(node, "variable", None), operations[node]) for node in order}
    return depth, edges, shapes, labels, hooks


def draw(panel, depth, edges, shapes, labels):
    levels = [[node for node in depth if depth[node] == level] for level in range(max(depth.values()) + 1)]
    place = {node: ((i + 0.5) / len(level), -depth[node]) for level in levels for i, node in enumerate(level)}
    for a, b in edges:
        panel.annotate(
            "", place[b], place[a], arrowprops={"arrowstyle": "->", "color": GREY, "shrinkA": 12, "shrinkB": 12}
        )
    for node, (x, y) in place.items():
        is_leaf = hasattr(node, "variable")
        shape = "x".join(map(str, shapes[node])) or "scalar"
        panel.text(
            x, y, f"{labels[node].removesuffix('Backward0')}\n{shape}", ha="center", va="center", fontsize=7,
            color="#fefefe", bbox={"boxstyle": "round", "color": ORANGE if is_leaf else BLUE},
        )  # fmt: skip
    panel.set(xlim=(0, 1), ylim=(-max(depth.values()) - 0.5, 0.5))
    panel.axis("off")


def main(out=None):
    torch.manual_seed(0)
    fused = MLP(20, (16,), 3)
    models = {"stock modules": fused.to_sequential(), "mlpkit.nn.MLP": fused}
    x, y = torch.randn(8, 20), torch.randint(3, (8,))
    figure, panels = plt.subplots(1, 2, figsize=(8, 5))
    found = {}
    for panel, (name, model) in zip(panels, models.items()):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        depth, edges, shapes, labels, hooks = graph(loss.grad_fn, {p: n for n, p in model.named_parameters()})
        loss.backward()
        for hook in hooks:
            hook.remove()
        operations = [labels[node] for node in depth if not hasattr(node, "variable")]
        found[name] = {"nodes": len(operations), "same shape": all(p.grad.shape == p.shape for p in model.parameters())}
        print(f"{name}: {len(operations)} nodes besides the parameters: {', '.join(operations)}")
        draw(panel, depth, edges, shapes, labels)
        panel.set_title(name)
    save(figure, out)
    print("Each gradient has its parameter's shape; fusing layers leaves fewer nodes to run and less to keep.")
    return found


if __name__ == "__main__":
    start(main)
