"""Every example of the gallery runs, draws its picture, and has found what it says."""

import ast
import importlib.util
import math
import statistics
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import matplotlib

matplotlib.use("agg")
ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("gallery", ROOT / "docs" / "gallery.py")
gallery = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gallery)
CLAIMS = {}


def claim(number):
    """Registers the check of what an example's ``main`` returns."""
    return lambda check: CLAIMS.setdefault(number, check)


@pytest.mark.parametrize("path", gallery.EXAMPLES, ids=lambda path: path.stem)
def test_the_example_finds_what_it_says(path):
    found = gallery.render(path)
    CLAIMS[int(path.name[:2])](found)
    assert (gallery.CACHE / f"{path.stem}.svg").stat().st_size > 5000
    assert gallery.printed_by(path).count("\n") >= 2


@pytest.mark.parametrize("path", gallery.EXAMPLES, ids=lambda path: path.stem)
def test_the_example_is_short_and_asks_a_question(path):
    text = path.read_text()
    question, answer = gallery.words_of(path)
    assert len(text.splitlines()) <= 80
    assert question.endswith((".", "?"))
    assert answer
    functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    assert functions[-1] == "main"


def test_every_example_has_a_claim_and_numbers_have_no_gap():
    assert sorted(CLAIMS) == [int(path.name[:2]) for path in gallery.EXAMPLES] == list(range(1, len(CLAIMS) + 1))


@claim(1)
def _(found):
    assert found["collapse"] < 1e-5
    assert found["identity"] < 0.7
    assert found["relu"] > 0.95
    assert found["slope of sigmoid"] == pytest.approx(0.25, abs=1e-6)
    assert found["identity error"] < 1e-6


@claim(2)
def _(found):
    assert 0 < found[(8,)]["kinks"] <= 8
    for entry in found.values():
        assert entry["off"] < 1e-10 < entry["at"]


@claim(3)
def _(found):
    assert found["range"] < found["seeds"]
    assert statistics.mean(found["sigmoid, 12 layers"]) < 0.2
    assert statistics.mean(found["relu"]) > 0.9


@claim(4)
def _(found):
    assert found["training mode"] > 0.1
    assert found["eval mode"] < 1e-5
    assert "more than 1 value" in found["alone"]


@claim(5)
def _(found):
    assert found["difference"] < 1e-4
    assert all(len(losses) == 200 and losses[-1] < losses[0] / 2 for losses in found["losses"].values())


@claim(6)
def _(found):
    assert found["autograd"] < 1e-12
    assert found["differences"] < 1e-6
    assert found["row sums"] < 1e-12


@claim(7)
def _(found):
    assert found["squared error", 4.6] < found["squared error", 0.4]
    assert found["cross-entropy", 4.6] > found["cross-entropy", 0.4]
    assert found["cross-entropy", 4.6, "steps"] < (found["squared error", 4.6, "steps"] or 301)


@claim(8)
def _(found):
    assert found["same"]
    assert found["ratio"] == pytest.approx(0.8)
    assert abs(found["w"] - 5) < 0.01


@claim(9)
def _(found):
    assert found["mlpkit.nn.MLP"]["nodes"] < found["stock modules"]["nodes"]
    assert all(entry["same shape"] for entry in found.values())


@claim(10)
def _(found):
    assert "mlpkit.reference" in found["fused"]
    assert found["error"] < 1e-6


@claim(11)
def _(found):
    assert found[1][1] < 0.5
    assert found[16][1] > 0.9
    assert found[16][1] - found[1][1] > 5 * abs(found[512][1] - found[16][1])
    assert found[512][0] == 1.0


@claim(12)
def _(found):
    assert found["gap"] < 0.03
    sizes = [entry["parameters"] for name, entry in found.items() if name != "gap"]
    assert max(sizes) / min(sizes) < 1.05


@claim(13)
def _(found):
    assert found["diabetes"][0] == ()
    assert found["rings"][0] == (32,)
    assert found["diabetes"][1] > 0.4
    assert found["rings"][1] > 0.9


@claim(14)
def _(found):
    assert (found["grid"]["unique"], found["random"]["unique"]) == (4, 16)
    assert found["better"] >= 3


@claim(15)
def _(found):
    assert {depth: entry["teeth"] for depth, entry in found.items()} == {1: 1, 3: 4, 6: 32}
    assert all(entry["difference"] < 1e-9 for entry in found.values())


@claim(16)
def _(found):
    train, test = found["train"], found["test"]
    assert all(train[20, d + 1] <= train[20, d] * 1.0001 for d in range(9))
    assert test[20, 3] < test[20, 1]
    assert test[20, 3] < test[20, 12]
    assert test[200, 12] < 1.5
    assert found["condition"][True] < found["condition"][False]
    assert found["gap", True] < found["gap", False]


@claim(17)
def _(found):
    assert found[found["best"]]["test"] < found[0.0]["test"] * 0.6
    assert 0 < found["best"] < 100
    assert found[100.0]["train"] > found[10.0]["train"] > found[0.0]["train"]


@claim(18)
def _(found):
    assert found["l1"]["zeros"] > 50
    assert found["l2"]["zeros"] == 0
    assert found["l1"]["is the mode"]
    assert found["l2"]["is the mode"]
    assert found["l1"]["error"] < found["l2"]["error"]


@claim(19)
def _(found):
    assert found["SGD"] < 1e-9
    assert found["Adam"] < 1e-9
    assert found["Adam against AdamW"] > 0.1


@claim(20)
def _(found):
    gains = found["gains"]
    assert gains["decay"] > 0
    assert gains["dropout"] > 0
    assert max(gains["decay"], gains["dropout"]) < gains["both"] < gains["decay"] + gains["dropout"]


@claim(21)
def _(found):
    assert found["swap"][0.8] > 0
    assert found["gain"]["0.8 then 0.2"] > found["gain"]["none"]


@claim(22)
def _(found):
    assert found["mean"] == pytest.approx(3, abs=0.1)
    assert found["variance"] == pytest.approx(9, abs=0.2)
    assert all(noisy > plain for noisy, plain in zip(found[0.5]["begin"], found[0.0]["begin"]))


@claim(23)
def _(found):
    assert found["20 % wrong"][1] > 0.02
    assert found["clean"][1] < 0.01


@claim(24)
def _(found):
    assert found["right"] < found["wrong"] < found["noise"]
    assert found["difference"][400] < found["difference"][2]
    assert found["agree"] > 0.97


@claim(25)
def _(found):
    assert found[1.0]["train"] > 0.95
    assert found[0.0]["reached"] < found[1.0]["reached"]
    assert found[0.4]["best"] - found[0.4]["last"] > 0.1
    assert found[0.0]["best"] - found[0.0]["last"] < 0.02


@claim(26)
def _(found):
    assert found["product"][1.0] > 1e10
    assert found["product"][0.3] < 1e-10
    assert found["sigmoid, xavier_uniform"][-1] < 1e-15
    assert 0.01 < found["relu, he_normal"][-1] < 100
    assert found["relu, xavier_uniform"][-1] < 1e-3


@claim(27)
def _(found):
    assert all(ratio == pytest.approx(1, abs=0.03) for ratio in found["variance"].values())
    signal = found["signal"]
    assert 0.1 < signal["relu", "he_normal"] < 10
    assert signal["relu", "xavier_normal"] < 1e-3
    assert signal["relu", "normal"] < 1e-10


@claim(28)
def _(found):
    constant, random = found["softmax regression, constant"], found["softmax regression, random"]
    assert constant["accuracy"] == pytest.approx(random["accuracy"], abs=0.02)
    assert found["MLP, constant"]["different"] == 1
    assert found["MLP, constant"]["accuracy"] < 0.7
    assert found["MLP, constant, dropout"]["different"] == 32
    assert found["MLP, random"]["accuracy"] > 0.9


@claim(29)
def _(found):
    assert found["range"] < 0.02
    assert found["Student t(3)"]["largest"] > 3 * found["normal"]["largest"]


@claim(30)
def _(found):
    assert found["best"]["LARS"] > found["best"]["SGD"] + 0.02


@claim(31)
def _(found):
    assert found["batch norm"]["worst"] < found["without"]["worst"] / 10
    assert found["batch norm"]["scores"][3.0] > 0.9 > 0.5 > found["without"]["scores"][3.0]


@claim(32)
def _(found):
    assert found["gap"][0] == pytest.approx(1)
    assert found["gap"][-1] < 0.05
    assert found["alone"] < 1e-4
    assert found["bias gradient"] < 1e-12 < found["weight gradient"]
    assert found["shift"] < 1e-10
    assert "layers.0.bias" not in found["parameters"]


@claim(33)
def _(found):
    assert found["scores"]["guess"] > 0.85
    assert found["scores"]["too low"] < 0.3
    assert found["scores"]["too high"] < 0.3


@claim(34)
def _(found):
    assert found["one rate"] == sorted(found["one rate"], reverse=True)
    assert found["rate grows with the batch"][-1] > found["one rate"][-1] + 0.3
    assert found["noise"][0] / found["noise"][-1] == pytest.approx(8, rel=0.25)


@claim(35)
def _(found):
    assert found["range"] < 0.03
    assert all(entry["good"] < 6 for name, entry in found.items() if name != "range")


@claim(36)
def _(found):
    assert found[1, 0.0]["epochs"] < found[10, 0.0]["epochs"] < found[200, 0.0]["epochs"]
    assert found[10, 0.05]["epochs"] < found[10, 0.0]["epochs"]
    assert found[1, 0.0]["held"] >= found[10, 0.0]["held"] >= found[200, 0.0]["held"]


@claim(37)
def _(found):
    assert found["best"] > found["mean"] + 0.05
    assert abs(found["fresh"] - 0.5) < 0.04


@claim(38)
def _(found):
    price, log = found["price, standardised"], found["logarithm of the price"]
    assert log["median"] < price["median"] / 1.5
    assert log["cheap"] < price["cheap"] / 3
    assert log["negative"] == 0


@claim(39)
def _(found):
    for way in ("accumulated", "split"):
        assert found[way, None] < 1e-12
        assert found[way, "batch"] > 1e-6


@claim(40)
def _(found):
    expected = {"Inf - Inf": "inf_minus_inf", "0 * Inf": "zero_times_inf", "Inf / Inf": "inf_over_inf"}
    for name, cause in expected.items():
        assert math.isnan(found[name]["value"])
        assert found[name]["cause"] == "overflow"
        assert cause in found[name]["causes"]
    assert found["sqrt(-1)"]["cause"] == "sqrt_of_negative"
    assert found["log(0)"]["cause"] == "log_of_zero"


@claim(41)
def _(found):
    for (case, fixed), entry in found.items():
        assert entry["verdict"] == ("healthy" if fixed else "failure"), case
        assert entry["finite"] == fixed
    assert found["softmax", False]["cause"] == "overflow"


@claim(42)
def _(found):
    assert found["clipped"] == 4
    assert "PowBackward0" in found["anomaly"]
    assert (found["op"], found["cause"]) == ("div", "division_by_zero")
    assert found["skipped"]
    assert found["kept"]
    assert math.isnan(found["sqrt"])
    assert found["pow"] == math.inf


@claim(43)
def _(found):
    assert len(found["seconds"]) >= 18
    assert found["seconds"][130] > 0


@claim(44)
def _(found):
    assert max(found["SVM"]["scores"]) - min(found["SVM"]["scores"]) > 0.1
    assert 1_000_000 in found["MLP"]["large"]
    assert 1_000_000 not in found["SVM"]["large"]
    assert found["MLP"]["large"][1_000_000] > found["MLP"]["large"][1000]


@claim(45)
def _(found):
    assert found["worst"] < 0.01
    assert found["fused"] < 0.6
    assert found["training", 8, 2048] > 10 * found["training", 8, 32]
    assert (
        found["training", 8, 2048] / found["inference"][8, 2048]
        > found["training", 1, 2048] / found["inference"][1, 2048]
    )
