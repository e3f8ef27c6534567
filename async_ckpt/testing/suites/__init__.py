"""The facts that every store has to prove, by what they are about; ``conformance`` puts them together."""
