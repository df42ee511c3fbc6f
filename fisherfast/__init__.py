"""fisherfast."""
from fisherfast import ops
from fisherfast._backend import BackendError, backend
