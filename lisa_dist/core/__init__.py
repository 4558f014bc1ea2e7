"""LISA itself: blocks, sampling, the controller and the order of a switch."""
