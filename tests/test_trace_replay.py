"""Replay bundles: the first bad operation again, bit for bit, without the script; nothing hostile runs."""

import io
import json
import random
import subprocess
import sys
import zipfile

import pytest
import torch
from corpus import CASES, VARIANTS, execute

from mlpkit.errors import DataError, MlpkitError
from mlpkit.trace import Replay, Tracer, replay
from mlpkit.trace._allowed import is_allowed

# In each, the first bad operation was given tensors that explain it.
REPLAYED = [
    "log_of_a_count",
    "log_of_a_softmax",
    "linear_overflows",
    "convolution_overflows",
    "attention_scores_overflow",
    "negative_running_variance",
    "layer_norm_without_eps",
    "every_token_ignored",
    "root_of_zero",
    "gradient_overflows_in_half",
    "adam_without_eps",
    "learning_rate_becomes_nan",
    "loss_scale_too_small_to_invert",
    "gradient_norm_overflows",
    "input_does_not_fit",
    "linear_regression_diverges",
]


def trace(name, variant=VARIANTS[0]):
    with Tracer() as tracer:
        execute(CASES[name], variant)
    return tracer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return trace("linear_overflows").bundle(tmp_path_factory.mktemp("bundle") / "bundle.mlpk")


@pytest.mark.parametrize("name", REPLAYED)
def test_the_operation_runs_again_bit_for_bit(name, tmp_path):
    tracer = trace(name)
    found = replay(tracer.bundle(tmp_path / "bundle.mlpk"))
    assert found.same, str(found)
    assert found.op == tracer.diagnosis.op
    assert found.recorded == tracer.diagnosis.sentence
    if tracer.diagnosis.cause not in ("hyperparameter", "explosion"):
        assert found.cause == tracer.diagnosis.cause
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle.mlpk"]


def test_a_fresh_process_needs_no_script(bundle):
    code = "from mlpkit.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "replay", str(bundle)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    recorded, replayed = result.stdout.splitlines()
    assert recorded.startswith("recorded: Step 1, forward of `0`")
    assert replayed.startswith("replayed: addmm gave Inf: exact result ")
    assert replayed.endswith("(overflow), as recorded, bit for bit.")


@pytest.mark.parametrize("name", ["nan_target", "every_unit_is_dead"])
def test_without_an_operation_to_blame_there_is_no_bundle(name, tmp_path):
    assert trace(name).bundle(tmp_path / "bundle.mlpk") is None
    assert list(tmp_path.iterdir()) == []


def test_a_healthy_run_leaves_none(tmp_path):
    with Tracer() as tracer:
        torch.ones(3).sum().item()
    assert tracer.bundle(tmp_path / "bundle.mlpk") is None


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rebuilt(path, parts, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def changed(bundle, path, **changes):
    parts = members(bundle)
    words = json.loads(parts["bundle.json"])
    words.update(changes)
    return rebuilt(path, {**parts, "bundle.json": json.dumps(words)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "aten::from_file"}, "may not run 'aten::from_file'"),
        ({"op": "prim::Print"}, "may not run"),
        ({"op": "aten::addmm", "overload": "__class__"}, "this torch has no"),
        ({"op": "aten::__class__"}, "may not run"),
        ({"op": "mlpkit::census"}, "may not run"),
        ({"version": 99}, "of version 99"),
        ({"threads": -1}, "lacks a part"),
        ({"extra": 1}, "lacks a part"),
        ({"args": [{"module": "os"}]}, "an argument that is none"),
        ({"args": [{"tensor": "t99"}]}, "an argument that is none"),
        ({"args": [{"n": "1e999x"}]}, "is no number"),
        ({"args": []}, "does not take"),
        ({"results": [{"n": "1"}]}, "results are no tensors"),
        ({"order": {}}, "dtype or order"),
        ({"order": {f"t{i}": [0, 0] for i in range(9)}}, "not this order"),
    ],
)
def test_what_a_bundle_may_not_say_is_refused(bundle, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        replay(changed(bundle, tmp_path / "hostile.mlpk", **changes))


def test_a_pickle_is_no_bundle(tmp_path):
    path = tmp_path / "hostile.mlpk"
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(DataError, match=r"must hold bundle\.json and tensors\.safetensors"):
        replay(path)


def test_what_is_compressed_or_too_large_is_not_opened(bundle, tmp_path):
    with pytest.raises(DataError, match="compressed or larger"):
        replay(rebuilt(tmp_path / "bomb.mlpk", members(bundle), zipfile.ZIP_DEFLATED))
    with pytest.raises(DataError, match="compressed or larger"):
        replay(rebuilt(tmp_path / "long.mlpk", {**members(bundle), "bundle.json": b" " * (2 << 20)}))


def test_other_members_and_paths_are_refused(bundle, tmp_path):
    with pytest.raises(DataError, match="nothing else"):
        replay(rebuilt(tmp_path / "more.mlpk", {**members(bundle), "../evil.py": b"print()"}))
    assert [entry.name for entry in tmp_path.iterdir()] == ["more.mlpk"]


@pytest.mark.parametrize("length", [0, 1, 30, 500])
def test_a_truncated_file_is_told_from_a_bundle(bundle, tmp_path, length):
    path = tmp_path / "short.mlpk"
    path.write_bytes(bundle.read_bytes()[:length])
    with pytest.raises(DataError, match=r"^replay: [^\n]*$"):
        replay(path)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*: No such file"):
        replay(tmp_path / "nothing.mlpk")


@pytest.mark.parametrize("seed", range(4))
def test_mutated_bundles_give_an_answer_or_a_clear_error(bundle, tmp_path, seed):
    chance = random.Random(seed)
    whole, parts = bundle.read_bytes(), members(bundle)
    path, told = tmp_path / "fuzzed.mlpk", []
    for _ in range(100):
        if chance.random() < 0.5:
            data = bytearray(whole)
        else:
            name = chance.choice(list(parts))
            data = bytearray(parts[name])
        for _ in range(chance.randint(1, 8)):
            place = chance.randrange(len(data))
            action = chance.randrange(3)
            if action == 0:
                data[place] = chance.randrange(256)
            elif action == 1:
                del data[place : place + chance.randint(1, 40)]
            else:
                data[place:place] = bytes(chance.choices(b'{}[]",:0129enult-\x00\xff', k=chance.randint(1, 20)))
            if not data:
                data = bytearray(b"\x00")
        if len(data) > 0 and data[:2] == b"PK":
            path.write_bytes(bytes(data))
        else:
            stream = io.BytesIO()
            with zipfile.ZipFile(stream, "w") as archive:
                for member, old in parts.items():
                    archive.writestr(member, bytes(data) if data and member == name else old)
            path.write_bytes(stream.getvalue())
        try:
            assert isinstance(replay(path), Replay)
        except MlpkitError as error:
            told.append(str(error))
    assert told
    assert not [message for message in told if "\n" in message]
    assert [entry.name for entry in tmp_path.iterdir()] == ["fuzzed.mlpk"]


def test_nothing_that_reads_files_or_calls_back_is_allowed():
    for name in ("from_file", "save", "_print", "tensor_split", "full", "empty", "repeat", "constant_pad_nd", "set_"):
        assert not is_allowed(f"aten::{name}")
    assert is_allowed("aten::add_")
    assert not is_allowed("aten::add__")
