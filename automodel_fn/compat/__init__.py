"""Other libraries' modules, name by name: code written for them runs after one changed import."""

__all__: list[str] = []
