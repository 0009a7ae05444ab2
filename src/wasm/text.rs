//! Long texts that become a `str` of the guest without passing through its code.
//!
//! A frame reaches Python as `bytes`, which the agent decodes: for a context that is three copies and
//! a scan by metered code. Instead the host scans the text, lets CPython make a `str` of the right
//! length and width (`PyUnicode_New`), writes the characters into it, and puts it into a list of the
//! agent, the mailbox, whose address the image's manifest has. The frame then says `letter`, or is
//! empty, and the agent takes the text out of the list.
//!
//! The other way, a call whose header has `pieces` has no body: it names the places in the guest's
//! memory where the parts of the body are.
//!
//! How such an object lies in memory is checked when an image is built ([`is_as_expected`]). Where it
//! is different, and for what isn't UTF-8, texts go the usual way.

use std::ops::Range;
use std::sync::Arc;

use wasmtime::Caller;

use super::guest::{Guest, charge_call, guest_slice, read_u32};
use crate::error::{Error, Result};
use crate::protocol::{CALL_BYTES_MAX, Message, REPLY_BYTES_MAX};

/// The C-API function that makes a `str` whose characters are yet to be written.
pub(crate) const NEW_FUNCTION: &str = "PyUnicode_New";
/// The C-API function that replaces an item of a list.
pub(crate) const SET_ITEM_FUNCTION: &str = "PyList_SetItem";

/// Shorter texts go the usual way, which is quicker for them. CPython also shares the objects of the
/// shortest ones.
const LETTER_BYTES_MIN: usize = 4 << 10;

/// Where a `str` has its length, in characters.
const LENGTH_AT: u32 = 8;
/// Where the characters of a `str` begin: one of ASCII has no cache for its UTF-8.
const ASCII_AT: usize = 20;
const OTHERS_AT: usize = 28;
/// Where the content of `bytes` begins.
const BYTES_AT: usize = 16;
/// What the agent has to know to name the places of texts and bytes.
pub(crate) const LAYOUT: [usize; 2] = [ASCII_AT, BYTES_AT];

/// Texts of which the agent tells where they are: one of each [`Width`].
pub(crate) const SAMPLES: [&str; 4] =
    ["kaa: text", "kaa: t\u{e9}xt", "kaa: t\u{20ac}xt", "kaa: \u{1f40d}"];

/// How CPython stores a text: by its largest character.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Ascii,
    Latin1,
    Two,
    Four,
}

impl Width {
    /// The narrowest one for a text with these bytes of UTF-8. The largest of them begins the largest
    /// character.
    fn of(utf8: &[u8]) -> Self {
        if utf8.is_ascii() {
            return Self::Ascii;
        }
        match utf8.iter().fold(0, |largest, byte| *byte.max(&largest)) {
            ..0xc4 => Self::Latin1,
            0xc4..0xf0 => Self::Two,
            _ => Self::Four,
        }
    }

    fn bytes_per_char(self) -> usize {
        match self {
            Self::Ascii | Self::Latin1 => 1,
            Self::Two => 2,
            Self::Four => 4,
        }
    }

    /// What `PyUnicode_New` has to be told.
    fn largest_char(self) -> i32 {
        match self {
            Self::Ascii => 0x7f,
            Self::Latin1 => 0xff,
            Self::Two => 0xffff,
            Self::Four => 0x10_ffff,
        }
    }

    fn characters_at(self) -> usize {
        if self == Self::Ascii { ASCII_AT } else { OTHERS_AT }
    }
}

/// A text, and what CPython needs for it.
struct Letter<'text> {
    utf8: &'text [u8],
    /// What was checked to be UTF-8: nothing of ASCII, which is.
    text: &'text str,
    width: Width,
    chars: usize,
}

impl<'text> Letter<'text> {
    /// `None` for what isn't UTF-8.
    fn new(utf8: &'text [u8]) -> Option<Self> {
        let width = Width::of(utf8);
        let (text, chars) = if width == Width::Ascii {
            ("", utf8.len())
        } else {
            let text = std::str::from_utf8(utf8).ok()?;
            (text, text.chars().count())
        };
        Some(Self { utf8, text, width, chars })
    }

    fn bytes(&self) -> usize {
        self.chars * self.width.bytes_per_char()
    }

    /// Where its characters are, in the object at `address`.
    fn place(&self, address: u32) -> Option<Range<usize>> {
        let start = (address as usize).checked_add(self.width.characters_at())?;
        Some(start..start.checked_add(self.bytes())?)
    }

    /// Writes the characters.
    fn write(&self, target: &mut [u8]) {
        let chars = self.text.chars().map(u32::from);
        match self.width {
            Width::Ascii => target.copy_from_slice(self.utf8),
            Width::Latin1 => target.iter_mut().zip(chars).for_each(|(to, char)| *to = char as u8),
            Width::Two => {
                let units = target.as_chunks_mut().0.iter_mut();
                units.zip(chars).for_each(|(to, char)| *to = (char as u16).to_le_bytes());
            }
            Width::Four => {
                let units = target.as_chunks_mut().0.iter_mut();
                units.zip(chars).for_each(|(to, char)| *to = char.to_le_bytes());
            }
        }
    }
}

/// What became of a letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Post {
    /// It's in the mailbox, and a header that isn't empty says so: the frame needs no body.
    Done,
    /// It has to go the usual way.
    Unsuitable,
    /// The guest has no memory for it, and an exception is pending.
    Refused,
}

/// Puts the body of a letter into the mailbox.
///
/// # Errors
///
/// When the guest traps.
pub(crate) async fn post(
    caller: &mut Caller<'_, Guest>,
    message: &mut Message,
) -> wasmtime::Result<Post> {
    let Some(mailbox) = caller.data().mailbox else { return Ok(Post::Unsuitable) };
    let len = message.body.len();
    if !message.letter || !(LETTER_BYTES_MIN..=REPLY_BYTES_MAX).contains(&len) {
        return Ok(Post::Unsuitable);
    }
    let Some(letter) = Letter::new(&message.body) else { return Ok(Post::Unsuitable) };
    charge_call(caller, letter.bytes().max(len) as u64)?;
    let handles = Arc::clone(caller.data().handles()?);
    let size = (letter.chars as i32, letter.width.largest_char());
    let object = handles.new_text.call_async(&mut *caller, size).await?;
    // What the function answers is checked like everything from the guest.
    let place = letter.place(object as u32).filter(|_| object != 0);
    let memory = handles.memory.data_mut(&mut *caller);
    let posted = match place.and_then(|place| memory.get_mut(place)) {
        Some(target) => {
            letter.write(target);
            let item = (mailbox as i32, 0, object);
            handles.set_item.call_async(&mut *caller, item).await? == 0
        }
        None => false,
    };
    if !posted {
        caller.data_mut().refused_bytes = Some(len);
        return Ok(Post::Refused);
    }
    if !message.header.is_empty() {
        message.header.insert("letter".into(), true.into());
    }
    Ok(Post::Done)
}

/// Reads the body of a message whose header names the places of its pieces.
///
/// # Errors
///
/// [`Error::Protocol`] for pieces outside the memory, or too many bytes of them.
pub(crate) fn collect(mut message: Message, memory: &[u8]) -> Result<Message> {
    let Some(pieces) = message.header.remove("pieces") else { return Ok(message) };
    let pieces = serde_json::from_value::<Vec<(u32, u32)>>(pieces);
    let pieces = pieces.map_err(|e| Error::protocol(format!("pieces of the wrong type: {e}")))?;
    let total: u64 = pieces.iter().map(|(_, len)| u64::from(*len)).sum();
    if total > CALL_BYTES_MAX as u64 {
        return Err(Error::protocol(format!("{total} bytes in one call")));
    }
    message.body = Vec::with_capacity(total as usize);
    for (address, len) in pieces {
        let piece = guest_slice(memory, address, len);
        let piece = piece.ok_or_else(|| Error::protocol("a piece outside of the memory"))?;
        message.body.extend_from_slice(piece);
    }
    Ok(message)
}

/// Whether the guest's texts and bytes lie in memory as this file takes them to: `addresses` are those
/// of [`SAMPLES`], and of the first of them as `bytes`.
pub(crate) fn is_as_expected(memory: &[u8], addresses: &[u32]) -> bool {
    let is_right = |(sample, address): (&&str, &u32)| -> Option<bool> {
        let letter = Letter::new(sample.as_bytes())?;
        let length = read_u32(memory, address.checked_add(LENGTH_AT)?)?;
        let mut expected = vec![0; letter.bytes()];
        letter.write(&mut expected);
        Some(length as usize == letter.chars && memory.get(letter.place(*address)?)? == expected)
    };
    let [texts @ .., bytes] = addresses else { return false };
    let first = SAMPLES[0].as_bytes();
    let found = bytes
        .checked_add(BYTES_AT as u32)
        .and_then(|at| guest_slice(memory, at, first.len() as u32));
    found == Some(first)
        && texts.len() == SAMPLES.len()
        && SAMPLES.iter().zip(texts).all(|pair| is_right(pair) == Some(true))
}
