"""Which keys of a config are read."""

from ml_collections import config_dict

OF_GRADIENT = {
    *("search.epochs", "search.alpha_learning_rate", "search.alpha_weight_decay"),
    *("search.alpha_warmup", "search.gradient_model", "search.second_order"),
    *("search.partial_channels", "search.edge_normalisation", "search.child_weight"),
    *("search.parent_weight", "search.gate_temperature"),
}
"""Keys of the gradient strategies alone."""

OF_SAMPLED = {
    *("search.candidates", "search.plus_beta_p", "search.measure", "search.max_scored"),
    *("search.plus_score_examples", "search.reliability", "search.certainty", "search.carry"),
    *("search.plus_training", "search.plus_paths"),
}
"""Keys of other strategies of sampled paths than `cp`."""


def note_reads(monkeypatch, config):
    """Return a set to which every dotted key that is read from now on is added."""
    read = set()
    sections = {id(config): ""}
    sections |= {
        id(value): f"{name}."
        for name, value in config.items()
        if isinstance(value, config_dict.ConfigDict)
    }
    getter = config_dict.ConfigDict.__getitem__

    def noting(self, key):
        read.add(f"{sections.get(id(self), '?')}{key}")
        return getter(self, key)

    monkeypatch.setattr(config_dict.ConfigDict, "__getitem__", noting)
    return read
