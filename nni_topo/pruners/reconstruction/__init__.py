"""The choice from which the layers behind can be solved anew: least squares, not topology."""
