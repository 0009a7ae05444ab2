//! Tenants: who shares the process, and what each may take of it.
//!
//! Every session belongs to a tenant. A session holds a [`Seat`], a running cell a [`Turn`]; both give
//! back what they hold when they're dropped, and their futures may be dropped at any time.
//!
//! - `account.rs` keeps a tenant's books: sessions, memory, cells, LM calls;
//! - `bucket.rs` is its allowance of processor time;
//! - `gate.rs` decides who computes, fairly between tenants;
//! - `line.rs` is standing in line.

mod account;
mod bucket;
mod gate;
mod line;
mod quotas;
#[cfg(test)]
mod tests;
mod turn;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use account::{Account, Shared};
use gate::Gate;
pub use quotas::{Quotas, Refusals, TenantUsage};
pub(crate) use turn::{LmQuota, Owner, Seat, Turn};

use crate::error::{Error, Result};

/// The name of the tenant of sessions that were opened without one.
const DEFAULT_NAME: &str = "default";
const NAME_BYTES_MAX: usize = 128;

/// All tenants of a process.
#[derive(Debug, Clone)]
pub(crate) struct Tenants {
    shared: Arc<Shared>,
    default: Tenant,
}

impl Tenants {
    /// No tenant but the default one; `processors` guests compute at once, at least one.
    ///
    /// It should not be more than the executor has threads: those beyond would hold a processor
    /// while they wait for a thread, where no fairness reaches them.
    pub(crate) fn new(processors: usize) -> Self {
        let gate = Gate::new(processors);
        let shared = Arc::new(Shared { gate, names: Mutex::new(BTreeMap::new()) });
        let account =
            Arc::new(Account::new(DEFAULT_NAME.into(), Quotas::default(), Arc::clone(&shared)));
        shared.names().insert(DEFAULT_NAME.into(), Arc::downgrade(&account));
        Self { shared, default: Tenant(account) }
    }

    /// A new tenant. It exists as long as a handle, a session or a cell of it.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] when the name is empty, too long, has control characters in it or belongs
    /// to a living tenant, and when a quota is out of its range.
    pub(crate) fn tenant(&self, name: &str, quotas: Quotas) -> Result<Tenant> {
        quotas.validate()?;
        let refuse = |reason: String| Err(Error::invalid("tenant", reason));
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return refuse(format!("the name must have 1 to {NAME_BYTES_MAX} bytes"));
        }
        if name.contains(char::is_control) {
            return refuse(format!("the name {name:?} has control characters in it"));
        }
        let mut names = self.shared.names();
        if names.get(name).is_some_and(|account| account.strong_count() > 0) {
            return refuse(format!("there is one of the name `{name}`; clone its handle"));
        }
        let account = Arc::new(Account::new(name.into(), quotas, Arc::clone(&self.shared)));
        names.insert(name.into(), Arc::downgrade(&account));
        Ok(Tenant(account))
    }

    /// The tenant of sessions that were opened without one. It has the default quotas until they're
    /// set, and never goes away.
    pub(crate) fn default_tenant(&self) -> Tenant {
        self.default.clone()
    }

    /// What every tenant has, by name.
    pub(crate) fn usage(&self) -> Vec<TenantUsage> {
        // The last handle may go while these are looked at: so not under the lock, which it takes.
        let accounts: Vec<Arc<Account>> =
            self.shared.names().values().filter_map(Weak::upgrade).collect();
        accounts.iter().map(|account| account.usage()).collect()
    }
}

/// Somebody whose sessions share quotas, and who gets as much of the processors as anybody else.
/// Made by [`Runtime::tenant`](crate::Runtime::tenant); a clone is the same tenant.
///
/// A tenant exists as long as a handle or a session of it.
#[derive(Clone)]
pub struct Tenant(Arc<Account>);

impl Tenant {
    /// Its name, unique among living tenants.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What its sessions may have.
    #[must_use]
    pub fn quotas(&self) -> Quotas {
        self.0.quotas()
    }

    /// Changes what its sessions may have, from the next thing on that they ask for. What they have
    /// is not taken away, and a cell in the queue keeps the wait that it began with.
    ///
    /// # Errors
    ///
    /// [`Error::Invalid`] names the first field that is out of its range; nothing was changed.
    pub fn set_quotas(&self, quotas: Quotas) -> Result<()> {
        quotas.validate()?;
        self.0.set_quotas(quotas);
        Ok(())
    }

    /// What its sessions have now, and had so far.
    #[must_use]
    pub fn usage(&self) -> TenantUsage {
        self.0.usage()
    }

    /// Its quotas of LM calls, for calls that no session makes.
    pub(crate) fn lm(&self) -> LmQuota {
        LmQuota::of(&self.0)
    }

    /// A session's part of the tenant.
    ///
    /// # Errors
    ///
    /// [`Error::Quota`] when the tenant has all its sessions.
    pub(crate) fn open_session(&self) -> Result<Seat> {
        Seat::open(&self.0, false)
    }

    /// As [`open_session`](Self::open_session), for a session whose cells run within a cell of
    /// another: they take none of [`Quotas::cells`].
    ///
    /// # Errors
    ///
    /// As there.
    pub(crate) fn open_nested_session(&self) -> Result<Seat> {
        Seat::open(&self.0, true)
    }
}

impl fmt::Debug for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tenant").field("name", &self.name()).finish_non_exhaustive()
    }
}
