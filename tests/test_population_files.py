"""Saved populations go on bit for bit, also after a kill; damaged and foreign ones are refused; ensembles."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from population_cases import assert_same_bits, classes_table, every_kind, numbers_table, population, state

from mlpkit.errors import ArgumentError, DataError, OutputError
from mlpkit.population import Ensemble, Member, Population, greedy

pytest.importorskip("safetensors")

# Save and load


def test_a_loaded_population_goes_on_bit_for_bit(tmp_path):
    table, other = classes_table(), classes_table(seed=5)
    fold = torch.arange(50)
    members = [Member(**(vars(m) | {"rows": fold if i % 2 else None})) for i, m in enumerate(every_kind(epochs=4))]
    whole = population(members, table, validation=other, metric="accuracy")
    parts = population(members, table, validation=other, metric="accuracy")
    for one in (whole, parts):
        one.train(2)
        one.set([1, 2], lr=1e-3)
        one.drop([3])
    parts.save(tmp_path)
    parts.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    loaded = Population.load(tmp_path, *table, validation=other, threads=2, progress=False)
    assert str(loaded.scores) == str(whole.scores)  # NaN is not equal to itself
    whole.fit()
    loaded.fit()
    for index in whole.members:
        assert_same_bits(state(loaded, index), state(whole, index), f"member {index}")
    assert str(loaded.scores) == str(whole.scores)
    assert loaded.add([Member()]) == [len(members)]


SCRIPT = """
import sys, torch
from population_cases import classes_table, every_kind, population
from mlpkit.population import Population
table = classes_table(400)
folder = sys.argv[1]
try:
    trained = Population.load(folder, *table, threads=1, progress=False)
except Exception as error:
    assert "holds no population" in str(error), error
    trained = population(every_kind(epochs=40)[::7], table)
print("ready", flush=True)
trained.fit(directory=folder, every=2)
print("done", flush=True)
"""


def test_a_killed_run_resumes_to_the_same_table_and_weights(tmp_path):
    whole = population(every_kind(epochs=40)[::7], classes_table(400)).fit()
    delays = [0.13, 0.31, None]
    for delay in delays:
        child = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
        )
        assert child.stdout.readline() == b"ready\n"
        if delay is None:
            assert child.stdout.readline() == b"done\n"
        else:
            time.sleep(delay)  # the point is random on purpose: whatever it hits must not matter
            child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    loaded = Population.load(tmp_path, *classes_table(400), progress=False)
    assert loaded.scores == whole.scores or str(loaded.scores) == str(whole.scores)
    for index in whole.members:
        assert_same_bits(state(loaded, index), state(whole, index), f"member {index}")


def test_damaged_foreign_and_missing_saves_are_refused(tmp_path):
    table = classes_table()
    with pytest.raises(DataError, match="holds no population"):
        Population.load(tmp_path, *table)
    trained = population([Member(hidden=(4,), epochs=1)], table).fit()
    trained.save(tmp_path)
    with pytest.raises(DataError, match="was trained on other data"):
        Population.load(tmp_path, table[0] + 1, table[1])
    file = tmp_path / "population.json"
    words = json.loads(file.read_text())
    file.write_text(json.dumps(words | {"version": 99}))
    with pytest.raises(DataError, match="version 99"):
        Population.load(tmp_path, *table)
    file.write_text(json.dumps(words | {"tensors": "nothing.safetensors"}))
    with pytest.raises(DataError, match="holds a damaged population"):
        Population.load(tmp_path, *table)
    file.write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        Population.load(tmp_path, *table)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        trained.save(tmp_path / "file")


# Ensembles


def test_a_greedy_ensemble_is_no_worse_than_its_best_member_and_is_one_module():
    table, other = classes_table(120), classes_table(120, seed=0)
    members = [Member(hidden=(h,), epochs=4, seed=h, lr=1e-2) for h in (3, 5, 9, 17)]
    trained = population(members, table, validation=other).fit()
    ensemble = greedy(trained, *other, size=10)
    chances = trained.predict_proba(other[0])
    alone = [float(-c.double().gather(1, other[1][:, None]).log().mean()) for c in chances]
    y = ensemble(other[0]).detach()
    together = float(-y.double().gather(1, other[1][:, None]).log().mean())
    assert together <= min(alone) + 1e-6
    assert torch.allclose(y.sum(1), torch.ones(120), atol=1e-5)
    by_hand = sum(w * trained.predict_proba(other[0], ids=i)[0] for w, i in zip(ensemble.weights, ensemble.ids))
    assert torch.allclose(y, by_hand, atol=1e-5)
    copy = Ensemble(list(ensemble.models), ensemble.weights.tolist(), loss="cross_entropy")
    copy.load_state_dict(ensemble.state_dict())
    assert torch.equal(copy(other[0]), y)


def test_an_ensemble_of_numbers_averages_them_on_their_own_scale():
    X, y = numbers_table(80, 4)
    trained = population([Member(hidden=(8,), seed=s, epochs=3) for s in range(3)], (X, y.exp()), log_target=True).fit()
    ensemble = greedy(trained, X, y.exp(), size=6)
    by_hand = sum(w * trained.predict(X, ids=i)[0] for w, i in zip(ensemble.weights, ensemble.ids))
    assert torch.allclose(ensemble(X), by_hand, rtol=1e-4)


def test_ensembles_refuse_what_they_cannot_average():
    trained = population([Member(epochs=1, optimizer="sgd", lr=1e30)], numbers_table()).fit()
    with pytest.raises(ArgumentError, match="size is 0"):
        greedy(trained, *numbers_table(), size=0)
    with pytest.raises(ArgumentError, match="one weight above 0 a model"):
        Ensemble([], [], loss="mse")


# The page


def test_the_snippets_of_the_page_run():
    page = (Path(__file__).parents[1] / "docs" / "population.md").read_text()
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(snippet, "docs/population.md", "exec"), names)
    assert names["scores"].status in ("patience", "epochs")
    assert names["scores"].best > 0.8
    assert {score.status for score in names["population"].scores.values()} == {"dropped", "epochs"}
    assert names["ensemble"](names["X"]).shape == (600, 2)
