package boot

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"git.thaloco.com/thaloco/banger/internal/fault"
)

// Sizes of a config drive, in bytes. The drive is read as root in the guest before anything else
// runs, so what it may hold is bounded on both sides.
const (
	sectorSize   = 512     // virtio-blk counts capacity in sectors of 512 bytes
	minDriveSize = 4 << 10 // no VMM refuses a drive of one page
	// MaxConfigSize is the largest config.json that is written or read.
	MaxConfigSize = 8 << 20
)

// WriteDrive renders the config drive at path: a tar (POSIX ustar) whose first member is
// config.json, padded to whole sectors. The file holds the VM's secrets: it is 0600 and appears
// under its name only when it is complete and on disk. fault.Invalid if c is not valid.
func WriteDrive(path string, c Config) (err error) {
	if err := c.Validate(); err != nil {
		return err
	}
	content, err := json.Marshal(c)
	if err != nil {
		return fault.Wrap(err, fault.Internal, c.VMID, "the guest config cannot be encoded")
	}
	if len(content) > MaxConfigSize {
		return fault.New(fault.Invalid, c.VMID, "the guest config has %d bytes, the most is %d", len(content), MaxConfigSize)
	}
	var drive bytes.Buffer
	w := tar.NewWriter(&drive)
	header := &tar.Header{Name: ConfigName, Mode: 0o600, Size: int64(len(content)), Format: tar.FormatUSTAR}
	if err := errors.Join(w.WriteHeader(header), writeAll(w, content), w.Close()); err != nil {
		return fault.Wrap(err, fault.Internal, c.VMID, "the config drive cannot be encoded")
	}
	size := max(minDriveSize, (drive.Len()+sectorSize-1)/sectorSize*sectorSize)
	drive.Write(make([]byte, size-drive.Len()))
	if err := replaceFile(path, drive.Bytes()); err != nil {
		return fault.Wrap(err, fault.Unavailable, c.VMID, "the config drive cannot be written")
	}
	return nil
}

func writeAll(w io.Writer, b []byte) error {
	_, err := w.Write(b)
	return err
}

// replaceFile writes content beside path and renames it into place: after a crash of the daemon
// path holds the old content or the new, never a part.
func replaceFile(path string, content []byte) (err error) {
	directory := filepath.Dir(path)
	f, err := os.CreateTemp(directory, "."+filepath.Base(path)+".*") // 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	// No fsync: a host that lost its power runs no guest, and each start makes the drive afresh.
	if err := errors.Join(writeAll(f, content), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// ReadDrive reads the config from a config drive. It reads no further than the config, so r may be
// the device itself. fault.Corrupt if the drive holds no valid config, fault.VersionSkew if the
// config is newer than this program.
func ReadDrive(r io.Reader) (Config, error) {
	var c Config
	// A tar header may claim extended headers of any length before the first member: bound it all.
	t := tar.NewReader(io.LimitReader(r, MaxConfigSize+64<<10))
	header, err := t.Next()
	if err != nil {
		return c, fault.Wrap(err, fault.Corrupt, "config drive", "it does not hold a tar archive")
	}
	if header.Name != ConfigName || header.Typeflag != tar.TypeReg {
		return c, fault.New(fault.Corrupt, "config drive", "its first member is %q, not %s", header.Name, ConfigName)
	}
	if header.Size > MaxConfigSize {
		return c, fault.New(fault.Corrupt, "config drive", "%s has %d bytes, the most is %d", ConfigName, header.Size, MaxConfigSize)
	}
	content := make([]byte, header.Size)
	if _, err := io.ReadFull(t, content); err != nil {
		return c, fault.Wrap(err, fault.Corrupt, "config drive", "%s is cut short", ConfigName)
	}
	// The version comes first: a newer config may hold what this program cannot even decode.
	var head struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(content, &head); err != nil {
		return c, fault.Wrap(err, fault.Corrupt, "config drive", "%s is not JSON", ConfigName)
	}
	if head.Version > ConfigVersion {
		return c, fault.New(fault.VersionSkew, "config drive",
			"the config has version %d, this guest program knows %d at most", head.Version, ConfigVersion).
			WithHint("start the VM again with the daemon that made its initrd")
	}
	if err := json.Unmarshal(content, &c); err != nil {
		return Config{}, fault.Wrap(err, fault.Corrupt, "config drive", "%s cannot be decoded", ConfigName)
	}
	if err := c.Validate(); err != nil {
		return Config{}, fault.Wrap(err, fault.Corrupt, "config drive", "%s is not valid", ConfigName)
	}
	return c, nil
}

// Time is the host's clock when the config was rendered.
func (c Config) Time() time.Time { return time.UnixMilli(c.TimeUnixMS) }

// String keeps secrets out of logs.
func (c Config) String() string {
	return fmt.Sprintf("guest config v%d of %s (%s)", c.Version, c.VMID, c.Hostname)
}
