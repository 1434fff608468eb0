"""What the op tests share: a float64 oracle, inputs, case tables, comparators and poisoning."""
