//! What a cell prints, kept up to a cap.

use crate::environment::Output;

/// Collects one stream. Beyond the cap it only counts, so that a guest that prints a gigabyte costs
/// the host no more than the cap.
#[derive(Debug, Default)]
pub(crate) struct Capture {
    kept: Vec<u8>,
    bytes_max: usize,
    total_bytes: u64,
    total_chars: u64,
}

impl Capture {
    /// An empty capture that keeps at most `bytes_max` bytes.
    pub(crate) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, ..Self::default() }
    }

    /// Takes what was written.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        self.total_bytes += bytes.len() as u64;
        // Every character has one byte that isn't a continuation byte (RFC 3629, section 3).
        self.total_chars += bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count() as u64;
        let room = self.bytes_max - self.kept.len();
        self.kept.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// The stream as it's shown: cut at `chars_max` characters with OpenEnv's suffix, if given.
    pub(crate) fn into_output(self, chars_max: Option<usize>) -> Output {
        let mut truncated = self.total_bytes > self.kept.len() as u64;
        let mut bytes = self.kept;
        if let Some(chars_max) = chars_max.filter(|max| self.total_chars > *max as u64) {
            let text = String::from_utf8_lossy(&bytes);
            let mut cut: String = text.chars().take(chars_max).collect();
            cut.push_str(&format!("\n... (truncated, total {} chars)", self.total_chars));
            bytes = cut.into_bytes();
            truncated = true;
        }
        Output { bytes, total_bytes: self.total_bytes, truncated }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_the_cap_and_counts_the_rest() {
        let mut capture = Capture::new(4);
        capture.write(b"abc");
        capture.write(b"def");
        let output = capture.into_output(None);
        assert_eq!(
            (&output.bytes[..], output.total_bytes, output.truncated),
            (&b"abcd"[..], 6, true)
        );
    }

    #[test]
    fn cuts_by_characters_with_the_suffix_of_openenv() {
        let mut capture = Capture::new(1024);
        capture.write("ééééé".as_bytes());
        let output = capture.into_output(Some(3));
        assert_eq!(output.text(), "ééé\n... (truncated, total 5 chars)");
        assert_eq!((output.total_bytes, output.truncated), (10, true));
        let mut capture = Capture::new(1024);
        capture.write("ééé".as_bytes());
        assert_eq!(capture.into_output(Some(3)).text(), "ééé");
    }
}
