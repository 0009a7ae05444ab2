//! Every fault that a call can have, and that the official clients get over each as Modal expects.

use std::time::Duration;

use serde_json::json;
use tonic::Code;

use crate::cloud::{Fault, StandInOptions};
use crate::{Client, assert_all_ended, run, start};

/// A fault, and what the client does about it.
pub(crate) struct Case {
    rpc: &'static str,
    fault: Fault,
    /// The case of the client that makes the call.
    case: &'static str,
    /// An RPC that is called so often at least then.
    calls: (&'static str, usize),
    /// Shorter than the clients take a token for fresh, where they have to ask for another.
    token_life: Duration,
}

pub(crate) fn all() -> Vec<Case> {
    let plain = |rpc, fault| Case {
        rpc,
        fault,
        case: "talk",
        calls: (rpc, 2),
        token_life: Duration::from_secs(1200),
    };
    let lost = || Fault::After(Code::Unavailable);
    let broken = |after_bytes| Fault::Mid { after_bytes };
    let refused = |rpc| Case {
        calls: ("SandboxGetCommandRouterAccess", 1),
        token_life: Duration::from_secs(25),
        ..plain(rpc, Fault::Unauthenticated)
    };
    let in_stream = |fault| Case {
        case: "streams",
        calls: ("TaskExecStdinStatus", 1),
        ..plain("TaskExecStdinWriteStream", fault)
    };
    vec![
        plain("AppGetOrCreate", Fault::Before(Code::Unavailable)),
        plain("AuthTokenGet", Fault::Before(Code::Unavailable)),
        plain("ImageGetOrCreate", Fault::After(Code::Internal)),
        Case { calls: ("ImageJoinStreaming", 3), ..plain("ImageJoinStreaming", broken(10)) },
        plain("SandboxCreateV2", Fault::Throttle(0.3)),
        plain("SandboxCreateV2", lost()),
        plain("SandboxTerminateV2", lost()),
        plain("TaskExecStart", lost()),
        plain("TaskExecStdinWrite", lost()),
        plain("TaskExecStdinWrite", Fault::Before(Code::Unavailable)),
        plain("TaskExecStdioRead", Fault::Before(Code::Unavailable)),
        plain("TaskExecStdioRead", broken(1)),
        plain("TaskExecStdioRead", broken(12)),
        plain("TaskExecWait", lost()),
        refused("TaskExecStart"),
        refused("TaskExecWait"),
        in_stream(broken(1)),
        in_stream(broken(300_000)),
        in_stream(lost()),
    ]
}

impl Case {
    /// Whether a client gets over it: that of JavaScript fails with the log of a build that breaks.
    pub(crate) fn is_for(&self, client: &str) -> bool {
        client != "node" || self.rpc != "ImageJoinStreaming"
    }

    pub(crate) fn name(&self) -> String {
        let kind = match &self.fault {
            Fault::Before(code) => format!("before_{code:?}"),
            Fault::After(code) => format!("after_{code:?}"),
            Fault::Mid { after_bytes } => format!("mid_{after_bytes}"),
            Fault::Throttle(_) => "throttled".into(),
            Fault::Unauthenticated => "unauthenticated".into(),
            Fault::Delay(_) => "late".into(),
        };
        format!("gets_over_{}_{}", self.rpc, kind.to_lowercase())
    }

    pub(crate) fn check(&self, client: &Client) {
        let token_life = self.token_life;
        let stand_in = start(StandInOptions { token_life, ..StandInOptions::default() });
        stand_in.fault(self.rpc, self.fault.clone());
        run(client, &stand_in, self.case, &json!({}));
        assert_eq!(stand_in.faults_left(), 0, "no call of {}", self.rpc);
        assert_all_ended(&stand_in);
        let (rpc, most) = self.calls;
        assert!(stand_in.calls(rpc) >= most, "{rpc}: {} calls", stand_in.calls(rpc));
        // What was asked for twice was made once: the sandbox, its entrypoint and the process in it.
        let sandboxes = stand_in.sandboxes();
        assert_eq!((sandboxes.len(), sandboxes[0].started), (1, 2), "{sandboxes:?}");
    }
}
