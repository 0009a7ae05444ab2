//! What the model is told about the code that it ran.

use crate::environment::{Execution, Variable};

/// Types whose variables are listed: those that RLM lists, with the subclasses of them that code uses
/// most.
const LISTED_TYPES: &[&str] = &[
    "str",
    "int",
    "float",
    "bool",
    "list",
    "dict",
    "tuple",
    "collections.Counter",
    "collections.OrderedDict",
    "collections.defaultdict",
];

/// The message about the results of one turn's blocks; `None` when there were none.
pub(super) fn message(results: &[String]) -> Option<String> {
    let several = results.len() > 1;
    let part = |(number, text): (usize, &String)| match several {
        true => format!("REPL output (block {number}):\n{text}"),
        false => format!("REPL output:\n{text}"),
    };
    let parts: Vec<String> = (1..).zip(results).map(part).collect();
    (!parts.is_empty()).then(|| parts.join("\n\n"))
}

/// RLM's form of a result: stdout, stderr and the names of variables, as far as there are any.
pub(super) fn result(execution: &Execution, variables: &[Variable], chars_max: usize) -> String {
    let mut parts = Vec::new();
    for stream in [&execution.stdout, &execution.stderr] {
        if !stream.bytes.is_empty() {
            parts.push(format!("\n{}", stream.text()));
        }
    }
    let listed = |variable: &&Variable| LISTED_TYPES.contains(&variable.type_name.as_str());
    let names = variables.iter().filter(listed).map(|variable| format!("'{}'", variable.name));
    let names: Vec<String> = names.collect();
    if !names.is_empty() {
        parts.push(format!("REPL variables: [{}]\n", names.join(", ")));
    }
    match parts.is_empty() {
        true => "No output".into(),
        false => cut(parts.join("\n\n"), chars_max),
    }
}

/// The first characters of a text, and how many are left out.
pub(super) fn cut(mut text: String, chars_max: usize) -> String {
    // Characters are never more than bytes: most texts need not be counted.
    if text.len() <= chars_max {
        return text;
    }
    let Some((at, _)) = text.char_indices().nth(chars_max) else { return text };
    let rest = text[at..].chars().count();
    text.truncate(at);
    text.push_str(&format!("... + [{rest} chars...]"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::{Outcome, Output};

    fn block(stdout: &str, stderr: &str, variables: &[(&str, &str)]) -> String {
        let output = |text: &str| Output {
            bytes: text.as_bytes().to_vec(),
            total_bytes: text.len() as u64,
            truncated: false,
        };
        let variable = |(name, type_name): &(&str, &str)| Variable {
            name: (*name).into(),
            type_name: (*type_name).into(),
            repr: String::new(),
            new: false,
        };
        let (stdout, stderr) = (output(stdout), output(stderr));
        let execution = Execution { stdout, stderr, ..Execution::new(Outcome::Completed) };
        let variables: Vec<Variable> = variables.iter().map(variable).collect();
        result(&execution, &variables, 20)
    }

    // The texts are what `rlm.utils.parsing.format_iteration` of rlms 0.1.3 makes.
    #[test]
    fn results_have_the_form_of_rlm() {
        let long = "é".repeat(25);
        for (blocks, expected) in [
            (vec![], None),
            (vec![block("", "", &[])], Some("REPL output:\nNo output".to_owned())),
            (
                vec![block("hi", "", &[("a", "dict"), ("f", "function")])],
                Some("REPL output:\n\nhi\n\nREPL variables:... + [7 chars...]".into()),
            ),
            (
                vec![block("", "\nValueError: x", &[])],
                Some("REPL output:\n\n\nValueError: x".into()),
            ),
            (
                vec![block("a", "b", &[]), block("", "", &[])],
                Some(
                    "REPL output (block 1):\n\na\n\n\nb\n\nREPL output (block 2):\nNo output"
                        .into(),
                ),
            ),
            (
                vec![block(&long, "", &[])],
                Some(format!("REPL output:\n\n{}... + [6 chars...]", "é".repeat(19))),
            ),
        ] {
            assert_eq!(message(&blocks), expected);
        }
    }

    #[test]
    fn only_longer_texts_are_cut() {
        for (text, chars_max, expected) in [
            ("abc", 3, "abc"),
            ("abcd", 3, "abc... + [1 chars...]"),
            ("ééé", 3, "ééé"),
            ("éééé", 0, "... + [4 chars...]"),
            ("", 0, ""),
        ] {
            assert_eq!(cut(text.into(), chars_max), expected);
        }
    }
}
