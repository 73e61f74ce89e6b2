"""Registers the constraint `llguidance`."""

from modelrig.components import Constraint
from modelrig.hookspecs import hookimpl

MODELRIG_API = "1.0"


@hookimpl
def modelrig_constraints() -> list[Constraint]:
    return [
        Constraint(
            name="llguidance",
            summary="grammars by llguidance: regular expressions of Rust, JSON schemas, and its dialect of Lark",
            implementation="modelrig_llguidance.llguidance_module:GuidanceCompiler",
            requires=("llguidance>=1.0",),
            install="pip install 'llguidance>=1.0'",
            languages={"regex", "json_schema", "lark"},
        )
    ]
