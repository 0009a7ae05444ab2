//! Sources that are deep: what reads them goes down a level for each, and there is no end to the levels.

use super::objects::Expect::{Completes, Raises};
use super::objects::{Expect, patient, suffer};

/// How deep: far beyond what any stack holds, and a file of a few hundred kilobytes.
const DEEP: usize = 30_000;

fn around(before: &str, inner: &str, after: &str) -> String {
    [&before.repeat(DEEP), inner, &after.repeat(DEEP)].concat()
}

fn before(each: &str, inner: &str) -> String {
    around(each, inner, "")
}

fn after(inner: &str, each: &str) -> String {
    around("", inner, each)
}

/// As deep as the tokenizer lets blocks be, and deeper.
fn blocks(head: &str, depth: usize) -> String {
    let lines: Vec<String> =
        (0..=depth).map(|at| " ".repeat(at) + if at < depth { head } else { "pass" }).collect();
    lines.join("\n")
}

type Source = (&'static str, fn() -> String, Expect);

const SOURCES: &[Source] = &[
    ("parentheses", || around("(", "1", ")"), Raises("MemoryError")),
    ("never closed", || before("(", ""), Raises("MemoryError")),
    ("lists", || around("[", "", "]"), Raises("MemoryError")),
    ("dicts", || around("{1: ", "1", "}"), Raises("MemoryError")),
    ("arguments", || around("f(", "", ")"), Raises("MemoryError")),
    ("negated", || before("-", "1"), Raises("MemoryError")),
    ("inverted", || before("~", "1"), Raises("MemoryError")),
    ("denied", || before("not ", "1"), Raises("MemoryError")),
    ("powers", || after("2", " ** 1"), Raises("MemoryError")),
    ("lambdas", || before("lambda: ", "1"), Raises("MemoryError")),
    ("conditions", || before("1 if 1 else ", "1"), Raises("MemoryError")),
    ("named", || around("(a := ", "1", ")"), Raises("MemoryError")),
    ("comprehensions", || around("[", "1", " for a in [1]]"), Raises("MemoryError")),
    ("annotations", || ["x: ", &around("list[", "int", "]")].concat(), Raises("MemoryError")),
    ("formatted", || around("f'{", "1", "}'"), Raises("MemoryError")),
    ("otherwise", || ["if 0: 1", &after("", "\nelif 0: 1")].concat(), Raises("MemoryError")),
    ("sums", || after("1", " + 1"), Raises("RecursionError")),
    ("attributes", || after("x", ".real"), Raises("RecursionError")),
    ("subscripts", || after("x", "[0]"), Raises("RecursionError")),
    ("calls of calls", || after("f", "()"), Raises("RecursionError")),
    (
        "loops of one",
        || ["x = [1", &after("", " for a in x"), "]"].concat(),
        Raises("RecursionError"),
    ),
    ("blocks", || blocks("if 1:", 99), Raises("RecursionError")),
    ("functions", || blocks("def f():", 99), Raises("RecursionError")),
    ("deeper blocks", || blocks("if 1:", 1000), Raises("IndentationError")),
    ("with", || ["with ", &after("x", ", x"), ": pass"].concat(), Raises("SyntaxError")),
    (
        "patterns",
        || ["match 1:\n case ", &around("[", "", "]"), ": pass"].concat(),
        Raises("SyntaxError"),
    ),
    ("decorators", || before("@f\n", "def g(): pass"), Raises("NameError")),
    ("comparisons", || after("1", " < 2"), Completes),
    ("assignments", || before("a = ", "1"), Completes),
    ("texts", || before("'a' ", ""), Completes),
    ("lines of one", || ["x = ", &before("\\\n", "1")].concat(), Completes),
    // At the end: names stay in an interpreter for good, here that of every package on the way.
    ("module of modules", || ["import a", &after("", ".a")].concat(), Raises("MemoryError")),
];

#[tokio::test]
async fn sources_that_are_deep_are_refused_by_an_exception() {
    suffer(SOURCES.iter().map(|(name, source, expect)| (*name, source(), expect)), patient()).await;
}
