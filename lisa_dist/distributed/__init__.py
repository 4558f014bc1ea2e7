"""Ranks and hosts: discovery, launching, health, signals."""
