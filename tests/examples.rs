//! The examples run, and what they claim is asserted in them.

macro_rules! examples {
    ($($name:ident),+) => {
        $(
            mod $name {
                include!(concat!("../examples/", stringify!($name), ".rs"));

                #[test]
                fn runs() {
                    main().unwrap();
                }
            }
        )+
    };
}

examples!(one_session, host_tools, many_tenants, fork_per_question);
