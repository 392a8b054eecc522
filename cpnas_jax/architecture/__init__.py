"""The search space's discrete side: sampling, indicator, dropping, edge policies, genotypes."""
