"""How much memory does training take beyond inference?

Inference needs one layer's input and output at a time; training keeps what every layer's backward will ask for, so it
grows with batch and depth. `memory_footprint` predicts it; measured here by what autograd really holds.
"""

import torch
from common import plt, save, start

from mlpkit.nn import MLP, memory_footprint

BATCHES, DEPTHS = [32, 128, 512, 2048], [1, 2, 4, 8]


def held(model, x):
    """Bytes that autograd keeps after the forward pass, each storage once, without parameters and input."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), x)}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(x)
    return sum(storages.values())


def main(out=None):
    found = {"predicted": {}, "measured": {}, "inference": {}}
    figure, (left, right) = plt.subplots(1, 2)
    for depth in DEPTHS:
        for batch in BATCHES:
            model = MLP(64, (256,) * depth, 10, dropout=0.1).to_sequential()
            prediction = memory_footprint(model, batch)
            found["predicted"][depth, batch] = sum(layer.saved for layer in prediction.layers)
            found["measured"][depth, batch] = held(model, torch.randn(batch, 64))
            found["inference"][depth, batch] = prediction.inference
            found["training", depth, batch] = prediction.training
    worst = max(abs(found["predicted"][key] / found["measured"][key] - 1) for key in found["measured"])
    found["worst"] = worst
    for depth, batch in ((1, 32), (1, 2048), (8, 32), (8, 2048)):
        print(
            f"depth {depth}, batch {batch:4}: inference {found['inference'][depth, batch] / 2**20:5.2f} MiB, training "
            f"{found['training', depth, batch] / 2**20:5.2f} MiB; kept for backward: predicted "
            f"{found['predicted'][depth, batch]}, measured {found['measured'][depth, batch]} bytes"
        )
    fused = memory_footprint(MLP(64, (256,) * 8, 10, dropout=0.1), 2048)
    found["fused"] = fused.training / found["training", 8, 2048]
    print(
        f"Predictions are within {worst:.1%} of what was held; fused layers need {found['fused']:.0%} of the "
        f"stock total."
    )

    left.loglog(BATCHES, [found["training", 4, b] / 2**20 for b in BATCHES], "o-", label="training")
    left.loglog(BATCHES, [found["inference"][4, b] / 2**20 for b in BATCHES], "o-", label="inference")
    left.set(xlabel="batch size (4 hidden layers)", ylabel="MiB")
    right.plot(DEPTHS, [found["training", d, 512] / 2**20 for d in DEPTHS], "o-")
    right.plot(DEPTHS, [found["inference"][d, 512] / 2**20 for d in DEPTHS], "o-")
    right.set(xlabel="hidden layers (batch 512)", ylim=(0, None))
    left.legend()
    save(figure, out)
    return found


if __name__ == "__main__":
    start(main)
