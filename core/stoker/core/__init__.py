"""What every part of stoker agrees on: units, models, clocks, errors."""
