"""Environments that are only stepped: networks, rollouts, soft actor-critic, the problem of imitation."""
