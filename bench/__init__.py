"""trimtab beside its peers on the same work: `python -m bench` (see docs/performance.md, "How it is measured")."""
