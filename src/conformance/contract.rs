//! The sentences of the contract, by short names that cases refer to.

/// `(id, how the sentence begins in the docs of [`Environment`](crate::Environment))`, in their order.
pub const CONTRACT: &[(&str, &str)] = &[
    ("state", "State made by one cell is there for the next"),
    ("results", "A Python exception is a result"),
    ("output", "Output printed before an exception, a limit or a trap is kept."),
    ("limits", "A limit never costs the session"),
    ("waiting", "Time spent waiting for the host"),
    ("forging", "A guest can't forge messages to the host"),
    ("restore", "`restore(snapshot())` changes nothing that code can observe"),
    ("dropping", "Dropping the future of any method is safe"),
    ("unsupported", "What a backend can't do is"),
];

#[cfg(test)]
mod tests {
    use super::*;

    /// The bullets in the docs of the trait.
    fn sentences() -> Vec<String> {
        let source = include_str!("../environment.rs");
        let (docs, _) = source.split_once("pub trait Environment:").unwrap();
        let mut sentences: Vec<String> = Vec::new();
        for line in docs.lines().filter_map(|line| line.strip_prefix("///")) {
            match line.strip_prefix(" - ") {
                Some(start) => sentences.push(start.to_owned()),
                None if line.starts_with("   ") => {
                    let last = sentences.last_mut().unwrap();
                    last.push(' ');
                    last.push_str(line.trim());
                }
                None => {}
            }
        }
        sentences
    }

    #[test]
    fn every_sentence_has_an_id_and_a_case() {
        let sentences = sentences();
        assert_eq!(sentences.len(), CONTRACT.len(), "{sentences:#?}");
        let cases = crate::conformance::cases().unwrap();
        for (sentence, (id, start)) in sentences.iter().zip(CONTRACT) {
            assert!(sentence.starts_with(start), "{id} is about {start:?}, not {sentence:?}");
            let has_case = cases.iter().any(|case| case.contract().any(|of| of == *id));
            assert!(has_case, "no case has the sentence {id}: {sentence}");
        }
    }
}
