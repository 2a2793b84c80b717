"""Custom ops and fused kernels, each beside its plain twin."""
