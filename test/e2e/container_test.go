//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// containers wants what Docker in a guest has of the guest's network: its containers get out, by the guest's address and the host's; and
// one's published port is the guest's, which the host reaches at an address.
func (h *host) containers(name, at string) {
	t := h.t
	t.Helper()
	if underFirecracker() {
		t.Log("no containers: Docker takes minutes to start in a guest of the lab, and TestLifeOfAVM waits for it there")
		return
	}
	// An image of nothing, with the guest's own programs.
	got := h.in(name, `set -e
mkdir -p /var/tmp/tree && cd /var/tmp/tree && ln -s usr/bin bin && ln -s usr/lib lib && ln -s usr/lib64 lib64
tar c . | docker import - tree >/dev/null
run="docker run --volume /usr:/usr:ro"
$run --rm tree /bin/bash -c 'exec 3<>/dev/tcp/`+worldAddr+`/8080; printf "GET / HTTP/1.0\r\n\r\n" >&3; cat <&3' | tail -n 1
$run --detach --name page --publish 8077:80 tree /bin/python3 -m http.server 80 >/dev/null`)
	if want := "the world, to " + hostAddr; got != want {
		t.Errorf("a container in the guest hears %q of the world, want %q", got, want)
	}
	h.until("the container's port answers", callTime, func() bool {
		conn, err := net.Dial("tcp", net.JoinHostPort(at, "8077"))
		if err != nil {
			return false
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		_, _ = fmt.Fprint(conn, "GET / HTTP/1.0\r\n\r\n")
		page, err := io.ReadAll(conn)
		return err == nil && strings.Contains(string(page), "Directory listing")
	})
	h.in(name, "docker rm --force page >/dev/null; rm -r /var/tmp/tree")
}
