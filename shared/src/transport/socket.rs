//! What every TCP socket of ours is set to, whichever side opened it.

use std::io;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};

/// After this long without an acknowledgement of sent bytes the kernel gives the connection up.
const USER_TIMEOUT: Duration = Duration::from_secs(30);

/// No Nagle delay, dead peers noticed within about half a minute. Buffer sizes are left to the
/// kernel, whose autotuning goes further than a process may ask for.
pub(super) fn tune<S: std::os::fd::AsFd>(socket: &S) -> io::Result<()> {
    let socket = SockRef::from(socket);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(Duration::from_secs(10))
            .with_interval(Duration::from_secs(5))
            .with_retries(4),
    )?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))
}
