"""What a caller asked for, checked: everything after trusts it."""
