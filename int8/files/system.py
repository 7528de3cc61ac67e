"""What differs on Windows: who owns a file, as whom this process runs, whether another has ended."""
from __future__ import annotations

import functools
import os
from pathlib import Path

IS_POSIX = os.name == "posix"
# The system, its administrators, the installer of Windows.
WINDOWS_ADMINISTRATORS = ("S-1-5-18", "S-1-5-32-544", "S-1-5-80-956008885-3418522649-1831038044-1853292631-2271478464")


def windows_owner(path: Path) -> str:
    """The SID of a file's owner. Who else an access list lets write is not looked at: folders of a user are that user's by default, those
    that this pack makes are by os.mkdir's mode 0700 (Python 3.12.4, 3.11.10, 3.10.15), and C:\\folder or a network share may not be."""
    import ctypes
    from ctypes import wintypes

    api = ctypes.WinDLL("advapi32", use_last_error=True)
    owner, descriptor = ctypes.c_void_p(), ctypes.c_void_p()
    api.GetNamedSecurityInfoW.argtypes = [wintypes.LPCWSTR, ctypes.c_int, wintypes.DWORD, *[ctypes.c_void_p] * 5]
    api.GetNamedSecurityInfoW.restype = wintypes.DWORD
    file, owner_only = 1, 1  # SE_FILE_OBJECT, OWNER_SECURITY_INFORMATION
    error = api.GetNamedSecurityInfoW(str(path), file, owner_only, ctypes.byref(owner), None, None, None, ctypes.byref(descriptor))
    if error:
        raise ctypes.WinError(error)
    try:
        return _windows_sid(owner)
    finally:
        _windows_free(descriptor)


@functools.cache
def windows_user() -> str:
    """The SID of the user of this process."""
    import ctypes
    from ctypes import wintypes

    api, kernel = ctypes.WinDLL("advapi32", use_last_error=True), ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    kernel.CloseHandle.argtypes = [wintypes.HANDLE]
    api.OpenProcessToken.argtypes = [wintypes.HANDLE, wintypes.DWORD, ctypes.POINTER(wintypes.HANDLE)]
    api.GetTokenInformation.argtypes = [wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD, ctypes.POINTER(wintypes.DWORD)]
    token, size, query, user = wintypes.HANDLE(), wintypes.DWORD(), 8, 1  # TOKEN_QUERY, TokenUser
    if not api.OpenProcessToken(kernel.GetCurrentProcess(), query, ctypes.byref(token)):
        raise ctypes.WinError(ctypes.get_last_error())
    try:
        content = ctypes.create_string_buffer(256)  # a pointer to the SID, its attributes, and the SID: 84 bytes at most
        if not api.GetTokenInformation(token, user, content, len(content), ctypes.byref(size)):
            raise ctypes.WinError(ctypes.get_last_error())
        return _windows_sid(ctypes.c_void_p.from_buffer(content))
    finally:
        kernel.CloseHandle(token)


def _windows_sid(sid) -> str:
    import ctypes

    api, text = ctypes.WinDLL("advapi32", use_last_error=True), ctypes.c_void_p()
    api.ConvertSidToStringSidW.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    if not api.ConvertSidToStringSidW(sid, ctypes.byref(text)):
        raise ctypes.WinError(ctypes.get_last_error())
    try:
        return ctypes.wstring_at(text.value)
    finally:
        _windows_free(text)


def windows_has_ended(pid: int) -> bool:
    """Whether this is known of a process."""
    import ctypes
    from ctypes import wintypes

    synchronize, no_such_process, ended = 0x00100000, 87, 0  # SYNCHRONIZE, ERROR_INVALID_PARAMETER, WAIT_OBJECT_0
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.OpenProcess.argtypes = [wintypes.DWORD, wintypes.BOOL, wintypes.DWORD]
    kernel.OpenProcess.restype = wintypes.HANDLE
    kernel.WaitForSingleObject.argtypes = [wintypes.HANDLE, wintypes.DWORD]
    kernel.WaitForSingleObject.restype = wintypes.DWORD
    kernel.CloseHandle.argtypes = [wintypes.HANDLE]
    if pid >> 32:
        return False
    if not (process := kernel.OpenProcess(synchronize, False, pid)):
        return ctypes.get_last_error() == no_such_process  # otherwise it is another user's, and lives
    try:
        return kernel.WaitForSingleObject(process, 0) == ended  # somebody still has a handle of it
    finally:
        kernel.CloseHandle(process)


def _windows_free(pointer) -> None:
    import ctypes

    kernel = ctypes.WinDLL("kernel32")
    kernel.LocalFree.argtypes = [ctypes.c_void_p]
    kernel.LocalFree(pointer)
