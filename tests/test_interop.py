"""mlpkit inside other people's loops: each test runs against the real thing, where it is installed."""

import numpy as np
import pytest
import torch

from mlpkit.nn import MLP


def test_skorch_trains_and_searches_over_a_network_of_ours():
    skorch = pytest.importorskip("skorch")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import GridSearchCV

    x, y = load_digits(return_X_y=True)
    x, y = (x[:600] / 16).astype(np.float32), y[:600].astype(np.int64)
    net = skorch.NeuralNetClassifier(
        MLP, criterion=torch.nn.CrossEntropyLoss, optimizer=torch.optim.Adam, lr=5e-3, max_epochs=15, batch_size=64,
        module__in_features=64, module__hidden=(32,), module__out_features=10, train_split=None, verbose=0,
    )  # fmt: skip
    search = GridSearchCV(net, {"module__hidden": [(2,), (32,)]}, cv=2, scoring="accuracy").fit(x, y)
    assert search.best_params_ == {"module__hidden": (32,)}
    assert search.best_score_ > 0.6
    assert search.predict(x[:3]).shape == (3,)
