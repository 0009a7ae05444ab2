//! The proxy between a handler and its server.

use std::net::IpAddr;

use reqwest::{Proxy, Url};

use super::options::HttpProxy;
use crate::error::{Error, Result};

/// The messages of parsers would quote the address, and with it a password.
const NO_ADDRESS: &str = "it is no address; write it as http://HOST:PORT";

/// A proxy as a client takes it.
pub(super) struct Way {
    pub(super) proxy: Proxy,
    /// Whether it's reached by TLS.
    pub(super) is_secure: bool,
    /// What errors call it, without its user and password.
    pub(super) name: String,
}

impl HttpProxy {
    /// The way by this proxy, unless `server` is reached without it: then it isn't looked at.
    pub(super) fn way_to(&self, server: &Url) -> Result<Option<Way>> {
        if is_excepted(&self.except, server.host_str().unwrap_or_default()) {
            return Ok(None);
        }
        let what = if self.source.is_empty() { "proxy" } else { &self.source };
        let refuse = |reason: &str| Err(Error::invalid(what, reason));
        let text = self.url.expose();
        let text = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let Ok(url) = Url::parse(&text) else { return refuse(NO_ADDRESS) };
        if !matches!(url.scheme(), "http" | "https") {
            return refuse(
                "only http:// and https:// proxies are supported; name such a one, or none",
            );
        }
        let (Some(host), Some(port)) = (url.host_str(), url.port_or_known_default()) else {
            return refuse(NO_ADDRESS);
        };
        let mut name = format!("the proxy {host}:{port}");
        if !self.source.is_empty() {
            name += &format!(" ({})", self.source);
        }
        let is_secure = url.scheme() == "https";
        match Proxy::all(url) {
            Ok(proxy) => Ok(Some(Way { proxy, is_secure, name })),
            Err(_) => refuse(NO_ADDRESS),
        }
    }
}

/// Whether a list of names, addresses and networks has this host in it.
fn is_excepted(list: &str, host: &str) -> bool {
    // An IPv6 address stands in brackets in a URL.
    let host = host.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.');
    let address: Option<IpAddr> = host.parse().ok();
    list.split(',').map(str::trim).filter(|entry| !entry.is_empty()).any(|entry| match address {
        _ if entry == "*" => true,
        Some(address) => is_in_network(entry, address),
        None => is_at_or_below(entry.trim_matches('.'), host),
    })
}

fn is_at_or_below(name: &str, host: &str) -> bool {
    let Some(start) = host.len().checked_sub(name.len()) else { return false };
    let (above, end) = host.as_bytes().split_at(start);
    end.eq_ignore_ascii_case(name.as_bytes()) && (above.is_empty() || above.ends_with(b"."))
}

/// Whether an address is this one, or in this network such as `10.0.0.0/8`.
fn is_in_network(entry: &str, address: IpAddr) -> bool {
    let (first, length) = match entry.split_once('/') {
        Some((first, length)) => match length.parse::<u32>() {
            Ok(length) => (first, Some(length)),
            Err(_) => return false,
        },
        None => (entry, None),
    };
    // A shift by all bits leaves nothing, so that a network of length 0 has all addresses.
    match (first.trim_matches(['[', ']']).parse(), address) {
        (Ok(IpAddr::V4(first)), IpAddr::V4(address)) => {
            let differing = first.to_bits() ^ address.to_bits();
            let rest = u32::BITS.checked_sub(length.unwrap_or(u32::BITS));
            rest.is_some_and(|rest| differing.checked_shr(rest).unwrap_or(0) == 0)
        }
        (Ok(IpAddr::V6(first)), IpAddr::V6(address)) => {
            let differing = first.to_bits() ^ address.to_bits();
            let rest = u128::BITS.checked_sub(length.unwrap_or(u128::BITS));
            rest.is_some_and(|rest| differing.checked_shr(rest).unwrap_or(0) == 0)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_excepted_by_name_address_or_network() {
        let local = "localhost,127.0.0.0/8,::1";
        for (list, host, expected) in [
            ("", "a.example", false),
            (" , ", "a.example", false),
            ("*", "a.example", true),
            ("x, *", "10.0.0.1", true),
            ("a.example", "a.example", true),
            ("A.example", "a.EXAMPLE.", true),
            ("example", "a.example", true),
            (".example", "a.example", true),
            ("mple", "a.example", false),
            ("b.a.example", "a.example", false),
            ("é", "aé", false),
            (local, "localhost", true),
            (local, "127.0.0.1", true),
            (local, "127.8.8.8", true),
            (local, "128.0.0.1", false),
            (local, "[::1]", true),
            (local, "[::2]", false),
            (local, "localhost.example", false),
            ("10.0.0.1", "10.0.0.1", true),
            ("10.0.0.1", "10.0.0.2", false),
            ("10.0.0.0/31", "10.0.0.1", true),
            ("10.0.0.0/31", "10.0.0.2", false),
            ("0.0.0.0/0", "10.0.0.2", true),
            ("0.0.0.0/0", "[fe80::1]", false),
            ("10.0.0.0/33", "10.0.0.0", false),
            ("10.0.0.0/-1", "10.0.0.0", false),
            ("10.0.0.0/x", "10.0.0.0", false),
            ("fe80::/10", "[fe81::1]", true),
            ("::/0", "[fe81::1]", true),
            ("[fe80::1]", "[fe80::1]", true),
        ] {
            assert_eq!(is_excepted(list, host), expected, "{list:?} {host}");
        }
    }
}
