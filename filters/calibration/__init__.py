"""How well the filters work, measured: known faults are planted into clean photographs, and the columns judged."""
