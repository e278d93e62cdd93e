"""Layouts measured on this machine, and the choice remembered."""
