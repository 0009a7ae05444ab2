//! Suites that need something from outside, which a machine may not have.
//!
//! Where it's missing their tests are reported as ignored, with the reason. `KAA_REQUIRE`, names of
//! suites with commas between them, turns that into failures: set it where everything has to run.

use libtest_mimic::{Completion, Failed, Trial};

const VARIABLE: &str = "KAA_REQUIRE";

/// A test of `suite` over what `need` gives; its error says what is missing.
pub(crate) fn trial<T: 'static>(
    suite: &'static str,
    name: impl Into<String>,
    need: fn() -> &'static Result<T, String>,
    test: impl FnOnce(&T) -> Result<(), Failed> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match need() {
        Ok(thing) => test(thing).map(|()| Completion::Completed),
        Err(reason) if is_required(suite) => {
            Err(Failed::from(format!("{VARIABLE} names {suite}, but {reason}")))
        }
        Err(reason) => Ok(Completion::ignored_with(reason)),
    })
}

fn is_required(suite: &str) -> bool {
    let names = std::env::var(VARIABLE).unwrap_or_default();
    names.split(',').any(|name| name.trim() == suite)
}
