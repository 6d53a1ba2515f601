"""The Kubernetes operator: custom resources in, scaled targets, status, conditions and events out."""
