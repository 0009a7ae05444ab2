//! Frames: a u32 big-endian length, then that many bytes.
//!
//! The maximum is checked before anything is allocated, and a clean end is told from a truncated
//! frame. RLM's handler protocol and the agent's channel over pipes both use this form.

use std::io::{self, IoSlice};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Reads one frame of at most `bytes_max` bytes; `None` is a clean end before the header.
///
/// # Errors
///
/// `UnexpectedEof` for a truncated frame, `InvalidData` for one that claims more than `bytes_max`.
pub(crate) async fn read_frame(
    reader: &mut (impl AsyncRead + Unpin),
    bytes_max: usize,
) -> io::Result<Option<Vec<u8>>> {
    match read_header(reader, bytes_max).await? {
        Some(length) => read_payload(reader, length).await.map(Some),
        None => Ok(None),
    }
}

/// Reads the length of a frame, for who has to make room before the payload comes.
///
/// # Errors
///
/// As [`read_frame`].
pub(crate) async fn read_header(
    reader: &mut (impl AsyncRead + Unpin),
    bytes_max: usize,
) -> io::Result<Option<usize>> {
    let mut header = [0u8; 4];
    let mut filled = 0;
    while filled < header.len() {
        match reader.read(&mut header[filled..]).await? {
            0 if filled == 0 => return Ok(None),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => filled += n,
        }
    }
    let length = u32::from_be_bytes(header) as usize;
    if length > bytes_max {
        let message = format!("a frame of {length} bytes exceeds the maximum of {bytes_max}");
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    Ok(Some(length))
}

/// Reads the payload that belongs to a header.
///
/// # Errors
///
/// `UnexpectedEof` if it ends before `length` bytes.
pub(crate) async fn read_payload(
    reader: &mut (impl AsyncRead + Unpin),
    length: usize,
) -> io::Result<Vec<u8>> {
    // Grow with what really arrives: the length alone must not make the host allocate.
    let mut payload = Vec::with_capacity(length.min(64 << 10));
    let read = reader.take(length as u64).read_to_end(&mut payload).await?;
    if read < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(payload)
}

/// Writes one frame; header and payload go to the system together, without a copy.
///
/// RLM's server reads the header with a single `recv`, so that a split header would break it.
///
/// # Errors
///
/// `InvalidInput` for a payload over `bytes_max`, before the first byte is written.
pub(crate) async fn write_frame(
    writer: &mut (impl AsyncWrite + Unpin),
    payload: &[u8],
    bytes_max: usize,
) -> io::Result<()> {
    if payload.len() > bytes_max || u32::try_from(payload.len()).is_err() {
        let message =
            format!("a frame of {} bytes exceeds the maximum of {bytes_max}", payload.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let header = (payload.len() as u32).to_be_bytes();
    let mut parts = [IoSlice::new(&header), IoSlice::new(payload)];
    let mut left = &mut parts[..];
    while !left.is_empty() {
        match writer.write_vectored(left).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            written => IoSlice::advance_slices(&mut left, written),
        }
    }
    writer.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: &[u8], bytes_max: usize) -> Result<Option<Vec<u8>>, io::ErrorKind> {
        read_frame(&mut &bytes[..], bytes_max).await.map_err(|e| e.kind())
    }

    #[tokio::test]
    async fn tells_clean_end_truncation_and_excess_apart() {
        assert_eq!(read(b"", 8).await, Ok(None));
        assert_eq!(read(b"\0\0\0\0", 8).await, Ok(Some(vec![])));
        assert_eq!(read(b"\0\0\0\x02hi", 8).await, Ok(Some(b"hi".to_vec())));
        assert_eq!(read(b"\0\0", 8).await, Err(io::ErrorKind::UnexpectedEof));
        assert_eq!(read(b"\0\0\0\x03hi", 8).await, Err(io::ErrorKind::UnexpectedEof));
        assert_eq!(read(b"\xff\xff\xff\xff", 8).await, Err(io::ErrorKind::InvalidData));
    }

    #[tokio::test]
    async fn what_is_written_can_be_read() {
        // The pipe takes a few bytes at a time, and first only the header.
        for (payload, pipe_bytes) in [(&b""[..], 64), (b"hi", 64), (b"a longer one", 3)] {
            let (mut near, mut far) = tokio::io::duplex(pipe_bytes);
            let (written, read) =
                tokio::join!(write_frame(&mut near, payload, 64), read_frame(&mut far, 64));
            written.unwrap();
            assert_eq!(read.unwrap().as_deref(), Some(payload));
        }
    }

    #[tokio::test]
    async fn refuses_an_oversized_frame_before_the_first_byte() {
        let mut out = Vec::new();
        let error = write_frame(&mut out, b"123456789", 8).await.unwrap_err();
        assert_eq!((error.kind(), out.len()), (io::ErrorKind::InvalidInput, 0));
    }
}
