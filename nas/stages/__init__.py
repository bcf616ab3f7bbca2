"""The stages of a run, each a function of a ``Run`` that leaves an artifact: supernet, latency, search, fidelity,
export, retrain, report."""
