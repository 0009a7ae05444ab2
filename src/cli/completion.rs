//! Whether the lines typed so far are a whole cell: a small reader of Python's tokens, good enough
//! to count brackets and to see open strings. Everything else is left to Python.

/// Statements that may go on after their first line, even when that line could stand alone.
const COMPOUND: &[&str] = &["async", "class", "def", "for", "if", "try", "while", "with"];

/// Whether more lines belong to the cell; `source` ends without the newline of its last line. A
/// block ends with an empty line.
pub(super) fn needs_more(source: &str) -> bool {
    let scan = Scan::of(source);
    if scan.broken {
        return false;
    }
    if scan.open_string || scan.depth > 0 || scan.backslash {
        return true;
    }
    if source.rsplit('\n').next().is_none_or(|line| line.trim().is_empty()) {
        return false;
    }
    let line = if scan.line.trim().is_empty() { &scan.line_before } else { &scan.line };
    let word = line.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
    line.trim_end().ends_with(':') || line.starts_with([' ', '\t', '@']) || COMPOUND.contains(&word)
}

/// What is open at the end of a source.
#[derive(Default)]
struct Scan {
    depth: usize,
    open_string: bool,
    /// Whether a string ends with its line: an error that Python will explain at once.
    broken: bool,
    backslash: bool,
    /// The last logical line, without comments and what strings contain.
    line: String,
    /// The last one before it that isn't blank.
    line_before: String,
}

impl Scan {
    fn of(source: &str) -> Self {
        let mut scan = Self::default();
        let mut rest = source;
        while let Some(c) = rest.chars().next() {
            let step = match c {
                '#' => rest.find('\n').unwrap_or(rest.len()),
                '\'' | '"' => scan.string(rest, c),
                '\\' if rest.len() == 1 => {
                    scan.backslash = true;
                    1
                }
                '\\' if rest.starts_with("\\\n") => 2,
                _ => {
                    scan.plain(c);
                    c.len_utf8()
                }
            };
            rest = &rest[step..];
        }
        scan
    }

    fn plain(&mut self, c: char) {
        match c {
            '\n' if self.depth == 0 => {
                let line = std::mem::take(&mut self.line);
                if !line.trim().is_empty() {
                    self.line_before = line;
                }
                return;
            }
            '(' | '[' | '{' => self.depth += 1,
            // One too many is Python's to complain about.
            ')' | ']' | '}' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        self.line.push(c);
    }

    /// Skips a string at the start of `rest`; returns its length.
    fn string(&mut self, rest: &str, quote: char) -> usize {
        self.line.push(quote);
        let quotes: String = [quote; 3].iter().collect();
        let triple = rest.starts_with(&quotes);
        let end = if triple { quotes.as_str() } else { &quotes[..1] };
        let mut at = end.len();
        let mut escaped_end = false;
        while let Some(c) = rest[at..].chars().next() {
            if rest[at..].starts_with(end) {
                return at + end.len();
            }
            if c == '\n' && !triple {
                self.broken = true;
                return at;
            }
            at += c.len_utf8();
            if c == '\\' {
                match rest[at..].chars().next() {
                    Some(escaped) => at += escaped.len_utf8(),
                    None => escaped_end = true,
                }
            }
        }
        self.open_string = triple || escaped_end;
        self.broken |= !self.open_string;
        rest.len()
    }
}

#[cfg(test)]
mod tests {
    use super::needs_more;

    #[test]
    fn whole_cells_are_run_at_once() {
        for source in [
            "",
            "1 + 1",
            "x = [1,\n 2]",
            "s = 'it''s'",
            "s = \"# no comment (\"",
            "f(')')",
            "'''a\nb'''",
            "x = 1  # :",
            "x = 'unterminated",
            "print(r'\\')",
            ")",
            "# comment (",
            "if x:\n    y\n",
            "if x:\n    y\n\n",
            "def f():\n    return 1\n\n",
            "x = {'a': 1}",
            "def f():\n    return 1\nf()",
            "a = 1 + \\\n 2",
            "lambda: 0",
            "'a\\'b'",
            "format(1)",
        ] {
            assert!(!needs_more(source), "{source:?}");
        }
    }

    #[test]
    fn open_cells_wait() {
        for source in [
            "if x:",
            "if x: pass",
            "for i in y:\n    print(i)",
            "@decorator",
            "x = (",
            "f(1,",
            "x = [1,\n\n",
            "'''text",
            "'''text\n\nmore",
            "a = 1 + \\",
            "class A: # comment",
            "def f(a,\n      b):",
            "if x:\n    y\nelse:",
            "match x:",
            "s = 'a\\",
            "try:\n    pass\nexcept E:\n    pass",
            "if x:\n    # comment",
            "if x:\n    y\n# comment",
        ] {
            assert!(needs_more(source), "{source:?}");
        }
    }
}
