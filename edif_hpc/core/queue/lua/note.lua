-- News about requests that wait, from whoever works on their target (PROVISIONING, DEPLOYING). Says the same thing once.
-- ARGV: status, description, id...
local status, description = ARGV[1], ARGV[2]
local now = now_ms()
local told = 0
for i = 3, #ARGV do
  local f = fields(ARGV[i], 'state', 'status', 'description')
  if f[1] == 'waiting' and (f[2] ~= status or f[3] ~= description) then
    emit(ARGV[i], now, status, description)
    told = told + 1
  end
end
return told
