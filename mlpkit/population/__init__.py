"""Hundreds of different MLPs trained at once, each as if alone: members, populations, ensembles.

Layer: above nn, init and functional; tune builds on it.
"""

from mlpkit.population.ensemble import Ensemble, greedy
from mlpkit.population.member import Member
from mlpkit.population.population import Population
from mlpkit.population.scores import Mark, Scores
from mlpkit.population.sharded import ShardedPopulation

__all__ = ["Ensemble", "Mark", "Member", "Population", "Scores", "ShardedPopulation", "greedy"]
