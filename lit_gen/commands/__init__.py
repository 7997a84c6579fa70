"""The commands, one a file: `lit-gen COMMAND` and `python -m lit_gen COMMAND`. No command imports another."""
