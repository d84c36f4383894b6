"""Policies and value functions of control agents."""
