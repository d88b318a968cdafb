package firecracker

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"

	"git.thaloco.com/thaloco/banger/internal/guest/boot"
)

// tinyKernel writes a kernel of a few bytes that Firecracker starts like a real vmlinux (an ELF without a
// PVH note: 64-bit mode, the boot parameters at RSI). It prints its command line on the serial port, then
// does what the first letter says: p says that it powers off and resets, r resets, anything else sleeps
// for ever. It needs no more of KVM than a host without vmx and svm may have.
func tinyKernel(t testing.TB, path string) {
	t.Helper()
	code := []byte{
		0x8b, 0xb6, 0x28, 0x02, 0x00, 0x00, // mov esi, [rsi+0x228]  boot_params.hdr.cmd_line_ptr
		0x89, 0xf3, //                         mov ebx, esi
		0x66, 0xba, 0xf8, 0x03, //             mov dx, 0x3f8         COM1
		0xac,       //                   next: lodsb
		0x84, 0xc0, //                         test al, al
		0x74, 0x03, //                         jz newline
		0xee,       //                         out dx, al
		0xeb, 0xf8, //                         jmp next
		0xb0, 0x0a, //                newline: mov al, 10
		0xee,       //                         out dx, al
		0x8a, 0x03, //                         mov al, [rbx]
		0x3c, 'r', //                          cmp al, 'r'
		0x74, 0x13, //                         je reset
		0x3c, 'p', //                          cmp al, 'p'
		0x75, 0x1c, //                         jne sleep
		0x48, 0x8d, 0x35, 0x18, 0, 0, 0, //    lea rsi, [rip+text]
		0xac,       //                   more: lodsb
		0x84, 0xc0, //                         test al, al
		0x74, 0x03, //                         jz reset
		0xee,       //                         out dx, al
		0xeb, 0xf8, //                         jmp more
		0xb9, 0, 0, 0x02, 0, //         reset: mov ecx, 1<<17        a moment, in which a test may act
		0xff, 0xc9, //                   wait: dec ecx
		0x75, 0xfc, //                         jnz wait
		0xb0, 0xfe, //                         mov al, 0xfe          the keyboard controller's reset
		0xe6, 0x64, //                         out 0x64, al
		0xf4,       //                  sleep: hlt
		0xeb, 0xfd, //                         jmp sleep
	}
	code = append(append(code, boot.EndLine(false)...), 0)
	const (
		load   = 0x1000000 // physical address of the code
		offset = 0x1000    // of the code in the file
	)
	var elf bytes.Buffer
	put := func(v ...any) {
		for _, v := range v {
			if err := binary.Write(&elf, binary.LittleEndian, v); err != nil {
				t.Fatal(err)
			}
		}
	}
	elf.WriteString("\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00") // 64-bit, little endian
	put(uint16(2), uint16(62), uint32(1), uint64(load), uint64(64), uint64(0), uint32(0),
		uint16(64), uint16(56), uint16(1), uint16(0), uint16(0), uint16(0))
	size := uint64(len(code))
	put(uint32(1), uint32(7), uint64(offset), uint64(load), uint64(load), size, size, uint64(0x1000)) // PT_LOAD
	file := make([]byte, offset+len(code))
	copy(file, elf.Bytes())
	copy(file[offset:], code)
	if err := os.WriteFile(path, file, 0o600); err != nil {
		t.Fatal(err)
	}
}
