//! Modal's messages, generated from the definitions beside this file by `tests/proto.rs`.

#[rustfmt::skip]
#[path = "proto/modal.client.rs"]
pub(super) mod client;
#[rustfmt::skip]
#[path = "proto/modal.task_command_router.rs"]
pub(super) mod task_command_router;
