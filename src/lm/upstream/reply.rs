//! Reading what a server answers: only what is needed, so that an answer's memory is its text's.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The first of a list; the rest is read over.
pub(super) struct First<T>(pub(super) Option<T>);

impl<T> Default for First<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for First<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FirstVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for FirstVisitor<T> {
            type Value = First<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_unit<E: Error>(self) -> Result<First<T>, E> {
                Ok(First(None))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<First<T>, A::Error> {
                let first = list.next_element()?;
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(First(first))
            }
        }
        deserializer.deserialize_any(FirstVisitor(PhantomData))
    }
}

/// The text of a message: itself, or that of its parts, one after the other. `None` if it has none;
/// parts of other kinds (thinking, calls of tools) are read over.
#[derive(Default)]
pub(super) struct Text(pub(super) Option<String>);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextVisitor;
        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text or a list of parts")
            }

            fn visit_unit<E: Error>(self) -> Result<Text, E> {
                Ok(Text(None))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Text, E> {
                Ok(Text(Some(text.to_owned())))
            }

            fn visit_string<E: Error>(self, text: String) -> Result<Text, E> {
                Ok(Text(Some(text)))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<Text, A::Error> {
                let mut whole = None;
                while let Some(part) = parts.next_element::<Part>()? {
                    let is_text = part.kind.is_none_or(|kind| kind == "text");
                    if let Some(text) = part.text.filter(|_| is_text) {
                        whole.get_or_insert_with(String::new).push_str(&text);
                    }
                }
                Ok(Text(whole))
            }
        }
        deserializer.deserialize_any(TextVisitor)
    }
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: Option<String>,
    text: Option<String>,
}

/// A number; whatever else a server puts in its place counts as absent.
pub(super) type Number = Loose<IgnoredAny>;

/// A number or an object, if it is one; anything else is read over, and no error.
#[derive(Default)]
pub(super) enum Loose<T> {
    Number(f64),
    Object(T),
    #[default]
    Other,
}

impl<T> Loose<T> {
    pub(super) fn number(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// The number as one of tokens; some servers write a float.
    pub(super) fn count(&self) -> Option<u64> {
        // The cast ends at both ends of the range and makes zero of what is no number.
        self.number().map(|count| count as u64)
    }

    pub(super) fn object(self) -> Option<T> {
        match self {
            Self::Object(object) => Some(object),
            _ => None,
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Loose<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct LooseVisitor<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for LooseVisitor<T> {
            type Value = Loose<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_unit<E: Error>(self) -> Result<Loose<T>, E> {
                Ok(Loose::Other)
            }

            fn visit_bool<E: Error>(self, _: bool) -> Result<Loose<T>, E> {
                Ok(Loose::Other)
            }

            fn visit_str<E: Error>(self, _: &str) -> Result<Loose<T>, E> {
                Ok(Loose::Other)
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Loose<T>, E> {
                Ok(Loose::Number(number as f64))
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Loose<T>, E> {
                Ok(Loose::Number(number as f64))
            }

            fn visit_f64<E: Error>(self, number: f64) -> Result<Loose<T>, E> {
                Ok(Loose::Number(number))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Loose<T>, A::Error> {
                while list.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Loose::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Loose<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Loose::Object)
            }
        }
        deserializer.deserialize_any(LooseVisitor(PhantomData))
    }
}
