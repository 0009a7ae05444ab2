//! What is written to stdout and stderr.
//!
//! What guests write is hostile: a terminal takes escape sequences as orders. On a terminal control
//! characters are shown in a visible form; elsewhere bytes go through as they are.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use super::Failure;

/// Characters of a text of others that a message quotes.
const EXCERPT_CHARS_MAX: usize = 500;

/// Both streams of this process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Console {
    pub(super) out_terminal: bool,
    pub(super) err_terminal: bool,
    /// Only errors, nothing about progress and limits.
    pub(super) quiet: bool,
}

impl Console {
    pub(super) fn new(quiet: bool) -> Self {
        Self {
            out_terminal: io::stdout().is_terminal(),
            err_terminal: io::stderr().is_terminal(),
            quiet,
        }
    }

    /// Writes to stdout, at once.
    pub(super) fn out(&self, bytes: &[u8]) -> Result<(), Failure> {
        if bytes.is_empty() {
            return Ok(());
        }
        let bytes = if self.out_terminal { visible(bytes) } else { bytes.into() };
        let mut stdout = io::stdout().lock();
        stdout.write_all(&bytes).and_then(|()| stdout.flush()).map_err(|e| match e.kind() {
            // As `head` does to whatever is before it in a pipe.
            io::ErrorKind::BrokenPipe => Failure::Closed,
            _ => Failure::Failed(format!("writing to stdout: {e}")),
        })
    }

    /// Writes one line to stdout.
    pub(super) fn line(&self, text: &str) -> Result<(), Failure> {
        self.out(format!("{text}\n").as_bytes())
    }

    /// Writes to stderr. Where it can't be written there is nobody to tell.
    pub(super) fn err(&self, bytes: &[u8]) {
        let bytes = if self.err_terminal { visible(bytes) } else { bytes.into() };
        let _ = io::stderr().lock().write_all(&bytes);
    }

    /// A message of Kaa's own, unless they are not wanted.
    pub(super) fn note(&self, message: &str) {
        if !self.quiet {
            self.complain(message);
        }
    }

    /// A message of Kaa's own that can't be turned off.
    pub(super) fn complain(&self, message: &str) {
        self.err(format!("kaa: {}\n", message.trim_end()).as_bytes());
    }
}

/// The beginning of a text of others, on one line.
pub(super) fn excerpt(text: &str) -> String {
    let mut shown = String::new();
    let mut chars = text.trim_end().chars();
    for c in chars.by_ref().take(EXCERPT_CHARS_MAX) {
        match c.is_control() {
            true => shown.extend(c.escape_default()),
            false => shown.push(c),
        }
    }
    let left = chars.as_str().len();
    if left > 0 {
        let _ = write!(shown, " … and {left} bytes more");
    }
    shown
}

/// Text for a terminal: control characters other than newline and tab as `^X` or `\xNN`, those that turn
/// the direction of writing or end a line elsewhere as `\u{NNNN}`, what isn't UTF-8 as U+FFFD.
fn visible(bytes: &[u8]) -> Cow<'_, [u8]> {
    let plain = |byte: &u8| matches!(byte, b'\n' | b'\t' | b' '..=b'~');
    if bytes.iter().all(plain) {
        return bytes.into();
    }
    let mut shown = String::with_capacity(bytes.len() + 16);
    for c in String::from_utf8_lossy(bytes).chars() {
        match c {
            '\n' | '\t' => shown.push(c),
            '\0'..='\x1f' | '\x7f' => {
                shown.push('^');
                shown.push(char::from(c as u8 ^ 0x40));
            }
            // Some terminals take these for two-byte escape sequences.
            '\u{80}'..='\u{9f}' => {
                let _ = write!(shown, "\\x{:02x}", c as u32);
            }
            // With these a line looks like another one than it is.
            '\u{61c}'
            | '\u{200e}'
            | '\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2066}'..='\u{2069}' => {
                shown.extend(c.escape_unicode());
            }
            _ => shown.push(c),
        }
    }
    shown.into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::{excerpt, visible};

    #[test]
    fn texts_of_others_are_quoted_on_one_line() {
        let long = "\u{e9}".repeat(501);
        let cut = format!("{} … and 2 bytes more", &long[..1000]);
        for (text, shown) in [
            ("", ""),
            ("429: caf\u{e9} is closed\n", "429: caf\u{e9} is closed"),
            ("a\r\nb\tc\u{1b}[2J\u{9b}", r"a\r\nb\tc\u{1b}[2J\u{9b}"),
            (&long[..1000], &long[..1000]),
            (&long, &cut),
        ] {
            assert_eq!(excerpt(text), shown);
        }
    }

    #[test]
    fn control_characters_are_shown_not_obeyed() {
        for (bytes, shown) in [
            (&b"plain\ttext\n"[..], "plain\ttext\n"),
            (b"\x1b[2J\x1b]0;title\x07", "^[[2J^[]0;title^G"),
            (b"a\rb\x7f\0", "a^Mb^?^@"),
            ("\u{9b}31m \u{e9}".as_bytes(), "\\x9b31m \u{e9}"),
            ("a\u{202e}b\u{2066}".as_bytes(), r"a\u{202e}b\u{2066}"),
            (b"\xff", "\u{fffd}"),
        ] {
            assert_eq!(visible(bytes), shown.as_bytes());
        }
    }
}
