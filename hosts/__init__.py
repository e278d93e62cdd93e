"""Programs of others that a pipeline runs inside of: each room knows one of them, and imports it lazily."""
