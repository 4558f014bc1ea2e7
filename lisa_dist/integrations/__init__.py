"""LISA in other trainers: each module is imported by the program that it is a plugin of, and imports it."""
