"""What every wing uses and what knows nothing of training: safe text, leases, validated JSON, paths."""
