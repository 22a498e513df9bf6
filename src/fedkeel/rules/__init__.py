"""Pure maths, one file per kind of rule. Siblings never import each other."""
