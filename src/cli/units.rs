//! Numbers with units, as they are typed and shown.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// Longer times are a typing error, and clocks overflow.
const SECONDS_MAX: f64 = 365.0 * 24.0 * 3600.0;
const SIZES: &[(&str, u64)] = &[("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)];
const SPANS: &[(&str, f64)] = &[("ms", 1e-3), ("us", 1e-6), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];

/// A number of bytes: `4096`, `64K`, `512M`, `2G`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, unit) = SIZES
            .iter()
            .find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?, *bytes)))
            .unwrap_or((text, 1));
        whole(digits).and_then(|number| number.checked_mul(unit)).map(Self).ok_or_else(|| {
            "write a number of bytes, alone or with K, M, G or T (powers of 1024): 512M".into()
        })
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match SIZES.iter().find(|(_, bytes)| self.0 >= *bytes && self.0.is_multiple_of(*bytes)) {
            Some((unit, bytes)) => write!(f, "{}{unit}", self.0 / bytes),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A length of time: `10` and `10s`, `500ms`, `1.5m`, `2h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span(pub(super) Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, unit) = SPANS
            .iter()
            .find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, *seconds)))
            .unwrap_or((text, 1.0));
        let plain = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
            && digits.chars().all(|c| c.is_ascii_digit() || c == '.');
        let seconds = digits.parse::<f64>().ok().filter(|_| plain).map(|number| number * unit);
        let time = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        match (time, seconds) {
            (Some(time), Some(seconds)) if !time.is_zero() && seconds <= SECONDS_MAX => {
                Ok(Self(time))
            }
            (_, Some(_)) => Err("it must be more than 0 and at most a year".into()),
            _ => Err("write seconds, or a number with ms, s, m or h: 10, 1.5s, 500ms".into()),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs_f64();
        if seconds < 1.0 {
            return write!(f, "{}ms", seconds * 1e3);
        }
        if seconds >= 120.0 && seconds % 60.0 == 0.0 {
            return write!(f, "{}m", seconds / 60.0);
        }
        write!(f, "{seconds}s")
    }
}

/// A count: `5000`, `5_000`, `200e9`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count(pub(super) u64);

impl FromStr for Count {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, zeros) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let number = whole(digits).and_then(|number| {
            number.checked_mul(10_u64.checked_pow(u32::try_from(whole(zeros)?).ok()?)?)
        });
        number.map(Self).ok_or_else(|| "write a whole number: 5000, 5_000 or 5e3".into())
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 != 0 && self.0.is_multiple_of(1_000_000_000) {
            return write!(f, "{}e9", self.0 / 1_000_000_000);
        }
        write!(f, "{}", self.0)
    }
}

/// Digits with `_` between them.
fn whole(text: &str) -> Option<u64> {
    if !text.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    text.replace('_', "").parse().ok()
}

/// Bytes as people read them.
pub(super) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_typed_is_what_is_meant_and_shown() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("64K", 65_536), ("512M", 512 << 20), ("4G", 1 << 32)]
        {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
        for (text, ms) in
            [("10", 10_000), ("10s", 10_000), ("500ms", 500), ("1.5m", 90_000), (".5", 500)]
        {
            assert_eq!(text.parse(), Ok(Span(Duration::from_millis(ms))), "{text}");
        }
        for (text, count) in [("1", 1), ("5_000", 5_000), ("200e9", 200_000_000_000)] {
            assert_eq!(text.parse(), Ok(Count(count)), "{text}");
        }
        for shown in ["1G", "64M", "100", "1025", "0"] {
            assert_eq!(shown.parse::<Size>().unwrap().to_string(), shown);
        }
        for shown in ["500ms", "60s", "10m", "1.5s"] {
            assert_eq!(shown.parse::<Span>().unwrap().to_string(), shown);
        }
        for shown in ["200e9", "1000", "0"] {
            assert_eq!(shown.parse::<Count>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for text in ["", "M", "-1", "1MB", "1.5G", "0x10", "99999999999G", "1 G", "_1"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        for text in ["", "s", "-1", "0", "0ms", "nan", "inf", "1e3", "1.2.3", "9999h", "+1", "5 s"]
        {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
        for text in ["", "-1", "1.5", "e9", "1e99", "1e", "many"] {
            assert!(text.parse::<Count>().is_err(), "{text}");
        }
    }
}
