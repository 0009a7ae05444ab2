//! When a failed call is tried again.

use std::time::{Duration, SystemTime};

use super::options::Retries;

/// The wait before try `number + 1`, after `number` have failed.
pub(super) fn wait(retries: &Retries, number: u32, retry_after: Option<Duration>) -> Duration {
    let doubled = 2u32.saturating_pow(number.saturating_sub(1));
    let longest = retries.base.saturating_mul(doubled).min(retries.cap);
    let backoff = longest.mul_f64(rand::random_range(0.5..=1.0));
    retry_after.unwrap_or_default().saturating_add(backoff)
}

/// How long the server asks to wait: `retry-after-ms`, or `Retry-After` as seconds or as a date. What
/// is neither is as good as nothing.
pub(super) fn retry_after<'a>(
    header: impl Fn(&str) -> Option<&'a str>,
    now: SystemTime,
) -> Option<Duration> {
    let number = |text: &str| text.trim().parse::<f64>().ok().filter(|number| *number >= 0.0);
    let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
    if let Some(milliseconds) = header("retry-after-ms").and_then(number) {
        return Some(seconds(milliseconds / 1e3));
    }
    let text = header("retry-after")?;
    if let Some(found) = number(text) {
        return Some(seconds(found));
    }
    let date = httpdate::parse_http_date(text.trim()).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_cap_and_differ() {
        let retries = Retries {
            base: Duration::from_millis(100),
            cap: Duration::from_millis(450),
            ..Retries::default()
        };
        for (number, longest) in [(1, 100), (2, 200), (3, 400), (4, 450), (200, 450)] {
            let longest = Duration::from_millis(longest);
            for _ in 0..100 {
                let found = wait(&retries, number, None);
                assert!(found >= longest / 2 && found <= longest, "{number}: {found:?}");
            }
        }
        let asked = Duration::from_secs(7);
        let found = wait(&retries, 1, Some(asked));
        assert!(found > asked && found < asked + retries.base * 2, "{found:?}");
        assert_eq!(wait(&retries, 1, Some(Duration::MAX)), Duration::MAX);
    }

    #[test]
    fn retry_after_has_three_forms() {
        let now = httpdate::parse_http_date("Wed, 21 Oct 2015 07:28:00 GMT").unwrap();
        for (headers, expected) in [
            (&[][..], None),
            (&[("retry-after", "3")], Some(3000)),
            (&[("retry-after", " 1.5 ")], Some(1500)),
            (&[("retry-after", "0")], Some(0)),
            (&[("retry-after", "Wed, 21 Oct 2015 07:28:09 GMT")], Some(9000)),
            (&[("retry-after", "Wed, 21 Oct 2015 07:27:00 GMT")], Some(0)),
            (&[("retry-after", "soon")], None),
            (&[("retry-after", "-1")], None),
            (&[("retry-after", "NaN")], None),
            (&[("retry-after-ms", "250"), ("retry-after", "3")], Some(250)),
            (&[("retry-after-ms", "x"), ("retry-after", "3")], Some(3000)),
        ] {
            let header = |name: &str| {
                let found = headers.iter().find(|(found, _)| *found == name);
                found.map(|(_, value)| *value)
            };
            let expected = expected.map(Duration::from_millis);
            assert_eq!(retry_after(header, now), expected, "{headers:?}");
        }
        let header = |name: &str| (name == "retry-after").then_some("inf");
        assert_eq!(retry_after(header, now), Some(Duration::MAX));
    }
}
