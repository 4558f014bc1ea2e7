"""Configurations of other tools as recipes: what each key is here, and what to do about one that is nothing here."""
